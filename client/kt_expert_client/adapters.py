"""The adapters of a run: making, copying and removing them, and what is done with single tensors and gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from kt_expert_proto.dtypes import ITEM_BYTES, Dtype
from kt_expert_proto.header import Op, Tensor
from kt_expert_proto.lora import PART_NUMBERS
from kt_expert_proto.v1 import session_pb2 as pb

from kt_expert_client.adapter import LayerLora, TensorKey, TensorSet
from kt_expert_client.asking import Asking
from kt_expert_client.errors import InvalidRequest
from kt_expert_client.session.calls import Call, OutTensor
from kt_expert_client.session.driver import Pending, Session
from kt_expert_client.staging import HostBuffer, HostTensor

_TIMEOUT_S = 3600.0  # a tensor may be large and the disk of a server that saves meanwhile slow
_BARRIER_TIMEOUT_S = 1800.0  # ranks may differ by a whole gradient accumulation
# Larger tensors travel some experts at a time: a layer's weights are gigabytes. Above the 32 MiB up to which malloc may keep
# what is given back.
_PIECE_BYTES = 40 * 1024 * 1024
_DIMENSIONS = 3  # experts, rows, columns


class RunAdapters:
    """Any thread may call. Each call waits for the server's answer, but those that begin with submit."""

    def __init__(self, session: Session, asking: Asking) -> None:
        self._session, self._asking = session, asking

    def create(
        self, name: str, lora: Iterable[LayerLora], *, trainable: bool = False, initialise: bool = False
    ) -> bool:  # fmt: skip
        """Makes an adapter of these layers; adds layers and projections to one that is there. False where nothing was to be
        made.

        B is zero, and so is A unless `initialise` has it drawn from the run's seed. `trainable` reserves memory for gradients
        and moments now and not with the first gradient. Raises InvalidRequest, NotFound, AlreadyExists for other ranks than
        those that are there, WrongPhase for a layer that is being trained, OutOfCapacity.
        """
        entries = [entry.to_proto() for entry in lora]
        create = pb.CreateAdapter(adapter=name, lora=entries, trainable=trainable, initialise=initialise)
        return self._ask(Op.CREATE_ADAPTER, pb.RequestOpen(create_adapter=create)).created

    def copy(self, source: str, name: str, *, trainable: bool = False) -> None:
        """Makes an adapter of the same layers and values, without moments. One that is there stays as it is: every rank of a
        run may ask. Raises as create()."""
        create = pb.CreateAdapter(adapter=name, copy_of=source, trainable=trainable)
        self._ask(Op.CREATE_ADAPTER, pb.RequestOpen(create_adapter=create))

    def delete(self, name: str) -> None:
        """Frees what the adapter takes; its tickets are stale. Nothing happens where another rank has done it."""
        self._ask(Op.DELETE_ADAPTER, pb.RequestOpen(delete_adapter=pb.AdapterName(adapter=name)))

    def norms(self, sets: Sequence[TensorSet], order: float = 2.0) -> tuple[float, list[float]]:
        """Barrier: norms of the gradients averaged over the members, of all tensors together and of each that is named with
        its layer, by set, layer and bit. The order is that of torch.linalg.vector_norm. Raises WrongPhase for a tensor
        without a gradient."""
        asked = pb.GradNorm(sets=[each.to_proto() for each in sets], order=order)
        head = self._ask(Op.GRAD_NORM, pb.RequestOpen(grad_norm=asked), _BARRIER_TIMEOUT_S)
        return head.norm, list(head.norms)

    def edit(self, edits: Iterable[pb.GradientEdit]) -> None:
        """Changes this member's gradients in place, in order."""
        self._ask(Op.EDIT_GRADIENTS, pb.RequestOpen(edit_gradients=pb.EditGradients(edits=edits)))

    def read(self, key: TensorKey, shape: tuple[int, int, int]) -> torch.Tensor:
        """One tensor as fp32 [E, rows, columns]. Raises NotFound."""
        pieces = _pieces(shape)
        if len(pieces) == 1:
            return _values(self.submit_read(key, shape), shape)
        whole = torch.empty(shape)
        waiting: list[tuple[slice, Pending]] = []
        for piece in pieces:  # the next is asked for while one is on its way
            waiting.append((piece, self.submit_read(key, (piece.stop - piece.start, *shape[1:]), piece.start)))
            if len(waiting) > 1:
                _put(whole, *waiting.pop(0))
        for each in waiting:
            _put(whole, *each)
        return whole

    def write(self, key: TensorKey, tensor: torch.Tensor, *, step: int = 0, sequence: int = 0) -> None:
        """Replaces one tensor; `step` is what a moment counts, and `sequence` what written() tells once it is done. Raises
        InvalidRequest or NotFound."""
        shape = tuple(tensor.shape)
        pieces = _pieces(shape) if len(shape) == _DIMENSIONS else [slice(0, 0)]
        if len(pieces) == 1:
            self.submit_write(key, tensor, step=step, sequence=sequence).wait()
            return
        waiting: list[Pending] = []
        for piece in pieces:
            last = sequence if piece is pieces[-1] else 0
            waiting.append(self.submit_write(key, tensor[piece], step=step, first_expert=piece.start, sequence=last))
            if len(waiting) > 1:
                waiting.pop(0).wait()
        for each in waiting:
            each.wait()

    def written(self, adapter: str) -> int:
        """The highest sequence that a member of the run has written one of its tensors with. Raises NotFound."""
        asked = pb.RequestOpen(list_tensors=pb.ListTensors(adapter=adapter))
        return int(self._ask(Op.LIST_TENSORS, asked).writes)

    def old(self) -> dict[str, frozenset[int]]:
        """Adapters that none of the trainers made that are connected now, and their layers."""
        head = self._ask(Op.LIST_TENSORS, pb.RequestOpen(list_tensors=pb.ListTensors(parameters=True)))
        return {name: frozenset(each.layer for each in head.tensors if each.adapter == name) for name in head.old_adapters}

    def submit_read(self, key: TensorKey, shape: tuple[int, ...], first_expert: int | None = None) -> Pending:
        """The result is the tensor ADAPTER, fp32 [E * rows, columns]; with `first_expert`, some experts' part of it."""
        name = _named(key, first_expert, shape[0])
        call = Call(Op.READ_TENSOR, pb.RequestOpen(read_tensor=name), _TIMEOUT_S, key.layer)
        call.expects = {Tensor.ADAPTER: math.prod(shape) * ITEM_BYTES[Dtype.FP32]}
        return self._session.submit(call)

    def submit_write(
        self, key: TensorKey, tensor: torch.Tensor, *, step: int = 0, first_expert: int | None = None, sequence: int = 0
    ) -> Pending:
        """`tensor` is [E, rows, columns] and may change as soon as this returns; with `first_expert`, it is some experts' part.
        Raises InvalidRequest for another shape."""
        if tensor.dim() != _DIMENSIONS or key.part not in PART_NUMBERS:
            raise InvalidRequest(f"{key} has shape {tuple(tensor.shape)}, expected [E, rows, columns] of a known part")
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        if values.data_ptr() == tensor.data_ptr():
            values = values.clone()  # it is sent, and perhaps sent again, after this returns
        rows, columns = int(tensor.shape[0] * tensor.shape[1]), int(tensor.shape[2])
        name = _named(key, first_expert, int(tensor.shape[0]))
        name.step, name.sequence = step, sequence
        sent = (OutTensor(Tensor.ADAPTER, Dtype.FP32, rows, columns, HostTensor(values)),)
        opened = pb.RequestOpen(write_tensor=name)
        return self._session.submit(Call(Op.WRITE_TENSOR, opened, _TIMEOUT_S, key.layer, Dtype.FP32, rows, columns, sent))

    def _ask(self, op: Op, opened: pb.RequestOpen, timeout_s: float = _TIMEOUT_S) -> pb.ResultHead:
        return self._asking.ask(op, opened, timeout_s)


def _named(key: TensorKey, first_expert: int | None, experts: int) -> pb.TensorName:
    """The whole tensor, or with `first_expert` that expert and those after it, `experts` of them."""
    name = pb.TensorName(adapter=key.adapter, tensor=key.tensor, part=PART_NUMBERS[key.part])
    if first_expert is not None:
        name.first_expert, name.experts = first_expert, experts
    return name


def _pieces(shape: tuple[int, ...]) -> list[slice]:
    """Experts that travel together."""
    expert_bytes = math.prod(shape[1:]) * ITEM_BYTES[Dtype.FP32]
    count = max(1, _PIECE_BYTES // max(1, expert_bytes))
    return [slice(first, min(first + count, shape[0])) for first in range(0, shape[0], count)] or [slice(0, 0)]


def _values(pending: Pending, shape: tuple[int, ...]) -> torch.Tensor:
    pending.wait()
    return cast("HostBuffer", pending.results[Tensor.ADAPTER]).tensor(torch.float32, shape)


def _put(whole: torch.Tensor, piece: slice, pending: Pending) -> None:
    whole[piece] = _values(pending, tuple(whole[piece].shape))
