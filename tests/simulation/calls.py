"""The requests of a simulated trainer, as the product's client makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from kt_expert_client.session.calls import Call, OutTensor
from kt_expert_proto.dtypes import ITEM_BYTES, Dtype
from kt_expert_proto.header import Op, Tensor
from kt_expert_proto.lora import DEFAULT_ADAPTER, PART_NUMBERS
from kt_expert_proto.v1 import session_pb2 as spb
from support.adapters import targets

from simulation.model import HIDDEN, TOKENS, TOP_K, lora_of

TIMEOUT_S = 100_000.0  # of every call: a schedule's outages are shorter


class _Source:
    """A tensor of a request. Implements Source; it is not to be read once the session has let go of it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.is_released = False

    is_ready = True

    def view(self) -> memoryview:
        assert not self.is_released, "a tensor is read after the session has let go of it"
        return self._values.data.cast("B")


def forward(
    layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, *, keeps: bool = True, seed: int = 0,
    adapters: Sequence[str] = (DEFAULT_ADAPTER,),
) -> Call:  # fmt: skip
    sent = (
        _out(Tensor.EXPERT_IDS, Dtype.INT32, ids),
        _out(Tensor.ROUTING_WEIGHTS, Dtype.FP32, weights),
        _out(Tensor.HIDDEN_STATES, Dtype.FP32, x),
    )
    asked = spb.Forward(
        top_k=TOP_K, save_for_backward=keeps, adapters=[spb.ActiveAdapter(adapter=name) for name in adapters], dropout_seed=seed
    )
    return _call(Op.FORWARD, spb.RequestOpen(forward=asked), layer, TOKENS, HIDDEN, sent, {Tensor.OUTPUT: x.nbytes})


def backward(
    layer: int, ticket: int, dy: np.ndarray, begins: bool, adapters: Sequence[str] = (DEFAULT_ADAPTER,)
) -> Call:  # fmt: skip
    wanted = [each for name in adapters for each in targets(lora_of(layer, adapter=name), replaced=begins, adapter=name)]
    opened = spb.RequestOpen(backward=spb.Backward(ticket=ticket, targets=wanted))
    expects = {
        Tensor.GRAD_HIDDEN_STATES: dy.nbytes,
        Tensor.GRAD_ROUTING_WEIGHTS: TOKENS * TOP_K * ITEM_BYTES[Dtype.FP32],
    }
    sent = (_out(Tensor.GRAD_OUTPUT, Dtype.FP32, dy),)
    return _call(Op.BACKWARD, opened, layer, TOKENS, HIDDEN, sent, expects)


def read_tensor(layer: int, tensor: str, rows: int, columns: int) -> Call:
    """A parameter [rows, columns]."""
    name = spb.TensorName(adapter=DEFAULT_ADAPTER, tensor=tensor, part=PART_NUMBERS["parameter"])
    call = Call(Op.READ_TENSOR, spb.RequestOpen(read_tensor=name), TIMEOUT_S, layer)
    call.expects = {Tensor.ADAPTER: rows * columns * ITEM_BYTES[Dtype.FP32]}
    return call


def write_tensor(layer: int, tensor: str, part: str, values: np.ndarray, step: int) -> Call:
    """`values` fp32 [E * rows, columns]; `step` is what a moment counts."""
    name = spb.TensorName(adapter=DEFAULT_ADAPTER, tensor=tensor, part=PART_NUMBERS[part], step=step)
    sent = (_out(Tensor.ADAPTER, Dtype.FP32, values),)
    rows, columns = values.shape
    return _call(Op.WRITE_TENSOR, spb.RequestOpen(write_tensor=name), layer, rows, columns, sent, {})


def _call(
    op: Op, opened: spb.RequestOpen, layer: int, rows: int, columns: int, sent: tuple[OutTensor, ...],
    expects: dict[Tensor, int],
) -> Call:  # fmt: skip
    return Call(op, opened, TIMEOUT_S, layer, Dtype.FP32, rows, columns, sent, expects, on_unneeded=_let_go)


def _out(tensor: Tensor, dtype: Dtype, values: np.ndarray) -> OutTensor:
    return OutTensor(tensor, dtype, values.shape[0], values.shape[1], _Source(values))


def _let_go(call: Call) -> None:
    for each in call.tensors:
        assert isinstance(each.source, _Source)
        each.source.is_released = True
