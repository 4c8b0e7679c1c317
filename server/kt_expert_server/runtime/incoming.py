"""A request while its frames arrive: declared sizes are checked before a byte is allocated, and every piece must fit."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from kt_expert_proto.frame import DTYPE_BYTES, Dtype, FrameError, Header, Op, Tensor
from kt_expert_proto.v1.session_pb2 import RequestOpen
from numpy.typing import NDArray

from kt_expert_server.config import Limits
from kt_expert_server.errors import InvalidRequest, NotFound
from kt_expert_server.model.loader import BaseModel
from kt_expert_server.runtime.compute import BackwardRequest, ForwardRequest
from kt_expert_server.runtime.registry import describe_layers

WIRE_DTYPES = {"bf16": Dtype.BF16, "fp32": Dtype.FP32}
_NUMPY = {Dtype.BF16: np.uint16, Dtype.FP32: np.float32, Dtype.INT32: np.int32}


@dataclass(slots=True)
class _Part:
    dtype: Dtype
    shape: tuple[int, int]
    buffer: bytearray
    received: int = 0


@dataclass(slots=True)
class IncomingRequest:
    """Buffers of one request, filled frame by frame."""

    header: Header
    open: RequestOpen
    parts: dict[Tensor, _Part]
    opened: float = field(default_factory=time.monotonic)
    deadline_s: float = 0.0  # from `opened`
    timer: asyncio.TimerHandle | None = None  # ends the request where it is not complete in time

    def cancel_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    @property
    def size_bytes(self) -> int:
        return sum(len(part.buffer) for part in self.parts.values())

    def add(self, header: Header, payload: memoryview) -> None:
        """Raises FrameError for an undeclared tensor, another dtype, or bytes out of order or past the end."""
        part = self.parts.get(header.tensor)
        if part is None or header.dtype != part.dtype:
            raise FrameError(f"request {self.header.request_id} does not take tensor {header.tensor.name} {header.dtype.name}")
        end = header.offset + payload.nbytes
        if header.offset != part.received or end > len(part.buffer):
            raise FrameError(
                f"tensor {header.tensor.name} of request {self.header.request_id}: bytes {header.offset} to {end} came, "
                f"expected to go on at {part.received} of {len(part.buffer)}"
            )
        part.buffer[header.offset : end] = payload
        part.received = end

    def finish(self) -> ForwardRequest | BackwardRequest:
        """Raises FrameError where a tensor is not complete."""
        for tensor, part in self.parts.items():
            if part.received != len(part.buffer):
                raise FrameError(
                    f"request {self.header.request_id} ended with {part.received} of {len(part.buffer)} bytes of {tensor.name}"
                )
        if self.header.op is Op.FORWARD:
            return ForwardRequest(
                self.header.request_id,
                self.header.layer,
                self._array(Tensor.HIDDEN_STATES),
                self._array(Tensor.EXPERT_IDS),
                self._array(Tensor.ROUTING_WEIGHTS),
                self.open.save_for_backward,
                self.open.use_adapter,
                self.open.dropout_seed,
            )
        return BackwardRequest(
            self.header.request_id,
            self.header.layer,
            self.open.ticket,
            self._array(Tensor.GRAD_OUTPUT),
            self.open.begin_window,
        )

    def _array(self, tensor: Tensor) -> NDArray[Any]:
        part = self.parts[tensor]
        return np.ndarray(part.shape, _NUMPY[part.dtype], part.buffer)


def declared_parts(
    header: Header, opened: RequestOpen, model: BaseModel, limits: Limits, wire_dtype: str
) -> dict[Tensor, tuple[Dtype, tuple[int, int]]]:
    """What a request must bring: tensor -> dtype and shape. Raises InvalidRequest or NotFound for a bad header."""
    layer = model.layers.get(header.layer)
    if layer is None:
        raise NotFound(f"layer {header.layer} has no experts; layers with experts: {describe_layers(model)}")
    plan = layer.plan
    if header.hidden != plan.hidden_size:
        raise InvalidRequest(f"layer {header.layer} takes hidden size {plan.hidden_size}, the request has {header.hidden}")
    wire = WIRE_DTYPES[wire_dtype]
    if header.dtype is not wire:
        raise InvalidRequest(f"this run's tokens travel as {wire.name}, the request has {header.dtype.name}")
    if header.tokens > limits.max_tokens:
        raise InvalidRequest(f"the request has {header.tokens} tokens, at most {limits.max_tokens} are taken; split it")
    tokens_shape = (header.tokens, header.hidden)
    if header.op is Op.BACKWARD:
        return {Tensor.GRAD_OUTPUT: (wire, tokens_shape)}
    if header.op is not Op.FORWARD:
        raise InvalidRequest(f"op {header.op.name} is not a request; expected FORWARD or BACKWARD")
    if opened.top_k != plan.top_k:
        raise InvalidRequest(f"layer {header.layer} routes each token to {plan.top_k} experts, the request has {opened.top_k}")
    routes = (header.tokens, opened.top_k)
    return {
        Tensor.EXPERT_IDS: (Dtype.INT32, routes),
        Tensor.ROUTING_WEIGHTS: (Dtype.FP32, routes),
        Tensor.HIDDEN_STATES: (wire, tokens_shape),
    }


def declared_bytes(parts: dict[Tensor, tuple[Dtype, tuple[int, int]]]) -> int:
    return sum(DTYPE_BYTES[dtype] * shape[0] * shape[1] for dtype, shape in parts.values())


def allocate(header: Header, opened: RequestOpen, parts: dict[Tensor, tuple[Dtype, tuple[int, int]]]) -> IncomingRequest:
    return IncomingRequest(
        header,
        opened,
        {
            tensor: _Part(dtype, shape, bytearray(DTYPE_BYTES[dtype] * shape[0] * shape[1]))
            for tensor, (dtype, shape) in parts.items()
        },
    )
