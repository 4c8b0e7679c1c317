"""Work that lists, reads and writes an adapter's tensors, between two other operations of the engine."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from kt_expert_proto.dtypes import ITEM_BYTES, Dtype
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.lora import BASE, GRADIENT, PARAMETER, PART_NUMBERS, tensor_bits
from kt_expert_proto.v1.session_pb2 import ResultHead, TensorInfo

from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.adapters.tensor_sets import find_adapter
from kt_expert_server.adapters.transfer import (
    LiveTensor,
    TensorId,
    all_tensors,
    base_shape,
    find_tensor,
    read_base,
    require_values,
    shape_of,
    write_tensor,
)
from kt_expert_server.adapters.window import Windows
from kt_expert_server.engine.buffers import BufferPool, PooledBuffer
from kt_expert_server.engine.passes import Tools, Trained
from kt_expert_server.engine.work import Outcome, WholeWork
from kt_expert_server.errors import InvalidRequest, NotFound, WrongPhase
from kt_expert_server.model.loader import BaseModel


class ListWork(WholeWork):
    """Names and shapes of the tensors there are, of one adapter or without a name of all, beside what else is told of them."""

    def __init__(
        self, adapters: Mapping[str, Adapter], about: ResultHead, name: str, *, parameters: bool, moments: bool
    ) -> None:
        super().__init__()
        self._about = about
        self._adapters, self._name, self._parameters, self._moments = adapters, name, parameters, moments

    def prepare(self) -> None:
        if self._name:
            self._adapters = {self._name: find_adapter(self._adapters, self._name)}

    def run(self) -> None:
        pass

    def commit(self) -> Outcome:
        found = all_tensors(self._adapters, parameters=self._parameters, moments=self._moments)
        infos = [
            TensorInfo(
                adapter=each.adapter, layer=each.layer, tensor=each.tensor, part=PART_NUMBERS[each.part], shape=live.shape
            )
            for each, live in found
        ]
        self._about.tensors.extend(infos)
        return Outcome(self._about)


class ReadWork(WholeWork):
    """One tensor as fp32 [E * rows, columns]."""

    def __init__(self, pool: BufferPool, trained: Trained, model: BaseModel, tensor: TensorId, reserved_bytes: int) -> None:
        super().__init__()
        self._pool, self._trained, self._model = pool, trained, model
        self._tensor, self._reserved_bytes = tensor, reserved_bytes
        self._copy: PooledBuffer | None = None
        self._rows = self._columns = 0
        self._shape: tuple[int, ...] = ()

    def prepare(self) -> None:
        if self._tensor.part == BASE:
            self._shape = base_shape(self._model.layers[self._tensor.layer], self._tensor)
        else:
            self._shape = self._live().shape
        size = math.prod(self._shape) * ITEM_BYTES[Dtype.FP32]
        if size != self._reserved_bytes:
            raise WrongPhase(f"{self._tensor} got another shape after it was asked for; ask again")
        experts, rows, self._columns = self._shape
        self._rows = experts * rows
        self._copy = self._pool.take(size)

    def run(self) -> None:
        assert self._copy is not None  # noqa: S101
        target = self._copy.array(Dtype.FP32, self._rows, self._columns).reshape(self._shape)
        if self._tensor.part == BASE:
            read_base(self._model.layers[self._tensor.layer], self._tensor, target)
        else:
            target[...] = self._live().read()

    def commit(self) -> Outcome:
        assert self._copy is not None  # noqa: S101
        about = Header(
            FrameType.TENSOR, layer=self._tensor.layer, op=Op.READ_TENSOR, tensor=Tensor.ADAPTER, dtype=Dtype.FP32,
            rows=self._rows, columns=self._columns,
        )  # fmt: skip
        outcome = Outcome(ResultHead(), [(about, self._copy)])
        self._copy = None
        return outcome

    def end(self) -> None:
        super().end()
        if self._copy is not None:
            self._copy.release()
            self._copy = None

    def _live(self) -> LiveTensor:
        adapter = find_adapter(self._trained.adapters, self._tensor.adapter)
        if self._tensor.part == GRADIENT:
            return _find_gradient(adapter, self._trained.windows, self._tensor)
        return find_tensor(adapter, self._tensor)


def _find_gradient(adapter: Adapter, windows: Windows, tensor: TensorId) -> LiveTensor:
    """Raises NotFound where nothing was added to it."""
    shape_of(adapter, tensor)
    window = windows.of(adapter.name)
    if not window.there(tensor.layer) & tensor_bits([tensor.tensor]):
        raise NotFound(
            f"{tensor} does not exist: no backward has added to it, or the server was started again since; run a backward first"
        )
    accumulator = window.accumulator(tensor.layer, adapter.layer(tensor.layer))
    return LiveTensor(tensor.of_memory(accumulator.tensor(tensor.tensor)))


class WriteWork(WholeWork):
    """Replaces one tensor, or some experts of it."""

    def __init__(
        self, tools: Tools, trained: Trained, tensor: TensorId, values: PooledBuffer, header: Header, step: int
    ) -> None:
        super().__init__()
        self._tools, self._trained, self._tensor, self._step = tools, trained, tensor, step
        self._shape = (header.rows, header.columns)
        self._values = values.array(Dtype.FP32, header.rows, header.columns)

    def prepare(self) -> None:
        adapter = find_adapter(self._trained.adapters, self._tensor.adapter)
        if self._tensor.part != PARAMETER:
            self._trained.reserve_training(self._tools, adapter)
            self._trained.windows.begin(adapter.name)

    def run(self) -> None:
        adapter = find_adapter(self._trained.adapters, self._tensor.adapter)
        experts, rows, columns = shape_of(adapter, self._tensor)
        if self._shape != (experts * rows, columns):
            raise InvalidRequest(f"{self._tensor} has shape {self._shape}, expected {(experts, rows, columns)}")
        values = np.ascontiguousarray(self._values).reshape(experts, rows, columns)
        if self._tensor.part == GRADIENT:  # may be anything, as a backward's result
            window = self._trained.windows.of(adapter.name)
            accumulator = window.accumulator(self._tensor.layer, adapter.layer(self._tensor.layer))
            self._tensor.of_memory(accumulator.tensor(self._tensor.tensor))[...] = values
            return
        require_values(self._tensor, values)
        write_tensor(adapter, self._tensor, values, self._step)
        if self._tensor.part == PARAMETER:
            adapter.layer(self._tensor.layer).encode(self._tensor.first_expert, experts)

    def commit(self) -> Outcome:
        adapter = find_adapter(self._trained.adapters, self._tensor.adapter)
        if self._tensor.part == PARAMETER:
            adapter.layer(self._tensor.layer).version += 1  # from here on, tickets of the old values are stale
        elif self._tensor.part == GRADIENT:
            self._trained.windows.of(adapter.name).add(self._tensor.layer, tensor_bits([self._tensor.tensor]))
        return Outcome(ResultHead())
