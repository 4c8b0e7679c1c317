"""Work that lists, reads and writes an adapter's tensors, between two other operations of the engine."""

from __future__ import annotations

import numpy as np
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.lora import PARAMETER, PART_NUMBERS
from kt_expert_proto.v1.session_pb2 import ResultHead, TensorInfo

from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.adapters.transfer import (
    TensorId,
    find_tensor,
    require_values,
    shape_of,
    stored_tensors,
    write_tensor,
)
from kt_expert_server.engine.buffers import BufferPool, PooledBuffer
from kt_expert_server.engine.work import Outcome, Work
from kt_expert_server.errors import InvalidRequest


class ListWork(Work):
    """Names and shapes of the tensors there are."""

    def __init__(self, adapter: Adapter, *, parameters: bool, moments: bool) -> None:
        super().__init__()
        self._adapter, self._parameters, self._moments = adapter, parameters, moments

    def run(self) -> None:
        pass

    def commit(self) -> Outcome:
        found = stored_tensors(self._adapter, parameters=self._parameters, moments=self._moments)
        infos = [
            TensorInfo(layer=each.layer, tensor=each.tensor, part=PART_NUMBERS[each.part], shape=live.shape)
            for each, live in found
        ]
        return Outcome(ResultHead(tensors=infos))


class ReadWork(Work):
    """One tensor as fp32 [E * rows, columns]."""

    def __init__(self, pool: BufferPool, adapter: Adapter, tensor: TensorId, reserved_bytes: int) -> None:
        super().__init__()
        self._pool, self._adapter, self._tensor, self._reserved_bytes = pool, adapter, tensor, reserved_bytes
        self._copy: PooledBuffer | None = None
        self._rows = self._columns = 0

    def prepare(self) -> None:
        live = find_tensor(self._adapter, self._tensor)
        assert live.nbytes == self._reserved_bytes, (live.nbytes, self._reserved_bytes)  # noqa: S101
        experts, rows, self._columns = live.shape
        self._rows = experts * rows
        self._copy = self._pool.take(live.nbytes)

    def run(self) -> None:
        assert self._copy is not None  # noqa: S101
        values = find_tensor(self._adapter, self._tensor).read()
        self._copy.array(Dtype.FP32, self._rows, self._columns)[...] = values.reshape(self._rows, self._columns)

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


class WriteWork(Work):
    """Replaces one tensor, whole or not at all."""

    def __init__(self, adapter: Adapter, tensor: TensorId, values: PooledBuffer, header: Header, step: int) -> None:
        super().__init__()
        self._adapter, self._tensor, self._step = adapter, tensor, step
        self._shape = (header.rows, header.columns)
        self._values = values.array(Dtype.FP32, header.rows, header.columns)

    def run(self) -> None:
        experts, rows, columns = shape_of(self._adapter, self._tensor)
        if self._shape != (experts * rows, columns):
            raise InvalidRequest(f"{self._tensor} has shape {self._shape}, expected {(experts, rows, columns)}")
        values = np.ascontiguousarray(self._values).reshape(experts, rows, columns)
        require_values(self._tensor, values)
        write_tensor(self._adapter, self._tensor, values, self._step)

    def commit(self) -> Outcome:
        if self._tensor.part == PARAMETER:
            self._adapter.version += 1  # from here on, tickets of the old values are stale
        return Outcome(ResultHead())
