"""One attached stream of a member: frames in, frames out, independent of what carries them."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import kt_expert_native as native
import numpy as np
from google.protobuf.message import DecodeError
from kt_expert_proto.frame import (
    MAX_PAYLOAD_BYTES,
    Dtype,
    FrameError,
    FrameType,
    Header,
    Op,
    Tensor,
    decode,
    encode,
    tensor_frames,
)
from kt_expert_proto.v1.session_pb2 import ErrorDetail, RequestOpen
from numpy.typing import NDArray

from kt_expert_server.errors import (
    DeadlinePassed,
    InternalError,
    InvalidRequest,
    OutOfCapacity,
    ServerError,
    ServerUnavailable,
    WrongPhase,
)
from kt_expert_server.runtime.compute import Compute, ForwardRequest
from kt_expert_server.runtime.incoming import IncomingRequest, allocate, declared_bytes, declared_parts
from kt_expert_server.runtime.memory import Kind
from kt_expert_server.runtime.observer import Observer
from kt_expert_server.runtime.registry import Registry
from kt_expert_server.runtime.run import Member, Outcome

_log = logging.getLogger(__name__)
# Numbers of the gRPC status codes (grpc/status.h), so that this module needs no gRPC.
STATUS_NUMBERS = {
    "CANCELLED": 1,
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
}
_MAX_ERROR_TEXT = 4096
_MS_PER_S = 1000
_MAX_UNACKNOWLEDGED = 4  # outcomes of refused requests hold no credits; this many times the credits is a broken client


class Session:
    """Validates frames, assembles requests, runs them and hands out their outcomes.

    A malformed frame raises FrameError out of `receive`: the transport ends the stream with it. Anything wrong with one
    request becomes that request's ERROR frame and leaves the stream open.
    """

    def __init__(
        self,
        member: Member,
        registry: Registry,
        compute: Compute,
        observer: Observer,
        send: Callable[[list[bytes]], None],
        close: Callable[[ServerError], None],
    ) -> None:
        self._member = member
        self._epoch = member.epoch
        self._registry = registry
        self._compute = compute
        self._observer = observer
        self._send = send
        self._close = close
        self._incoming: dict[int, IncomingRequest] = {}
        self._refused: set[int] = set()  # requests whose remaining frames are to be ignored
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self) -> None:
        """Makes this the member's stream; outcomes of requests that were under way come here."""
        if self._member.sink is not None:
            self._member.sink.close(WrongPhase("another stream of the same member was opened"))
        self._member.sink = self

    def detach(self) -> None:
        """The stream is gone: half-received requests are dropped, accepted ones go on."""
        self._drop_incoming()
        if self._member.sink is self:
            self._member.sink = None
            self._member.last_seen = time.monotonic()

    def _drop_incoming(self) -> None:
        for incoming in self._incoming.values():
            self._give_back(incoming)
            self._member.dropped.add(incoming.header.request_id)  # it never took effect, so it may be sent again
        self._incoming.clear()

    def send(self, frames: list[bytes]) -> None:
        self._send(frames)

    def close(self, error: ServerError) -> None:
        """Acts at once: nothing this stream still delivers counts any more."""
        self._drop_incoming()
        if self._member.sink is self:
            self._member.sink = None
        self._close(error)

    def receive(self, message: bytes) -> None:
        """Takes one message off the wire."""
        for header, payload in decode(message):
            self._frame(header, payload)

    def _frame(self, header: Header, payload: memoryview) -> None:
        if header.epoch != self._epoch:
            raise FrameError(f"frame of epoch {header.epoch} on a stream of epoch {self._epoch}")
        if self._member.sink is not self:
            raise FrameError("this stream was replaced by a newer one")
        self._member.last_seen = time.monotonic()
        match header.type:
            case FrameType.OPEN:
                self._open(header, payload)
            case FrameType.DATA:
                self._data(header, payload)
            case FrameType.END:
                self._end(header)
            case FrameType.CANCEL:
                self._cancel(header.request_id)
            case FrameType.ACK:
                self._acknowledge(header.request_id)
            case FrameType.RELEASE:
                self._release(header.request_id)
            case FrameType.RESULT | FrameType.ERROR:
                raise FrameError(f"frame type {header.type.name} only travels from the server")
            case _:
                assert_never(header.type)

    def _open(self, header: Header, payload: memoryview) -> None:
        request_id = header.request_id
        if self._is_repeat(request_id):
            return
        if request_id <= self._member.last_request_id and request_id not in self._member.dropped:
            raise FrameError(f"request id {request_id} came after {self._member.last_request_id}; ids of a member increase")
        self._member.dropped.discard(request_id)
        self._member.last_request_id = max(request_id, self._member.last_request_id)
        if len(self._member.outcomes) >= _MAX_UNACKNOWLEDGED * self._registry.limits.credit_requests:
            raise FrameError(f"{len(self._member.outcomes)} outcomes are not acknowledged; acknowledge them as they come")
        try:
            opened = RequestOpen.FromString(bytes(payload))
        except DecodeError as error:
            raise FrameError(f"OPEN of request {request_id} does not hold a RequestOpen: {error}") from None
        try:
            self._accept(header, opened)
            self._member.changed.notify()
        except ServerError as error:
            self._refused.add(request_id)
            self._fail(header, error)

    def _accept(self, header: Header, opened: RequestOpen) -> None:
        member, limits = self._member, self._registry.limits
        if self._registry.is_stopping:
            raise ServerUnavailable("the server is stopping and takes no new requests; connect to another one")
        parts = declared_parts(header, opened, self._registry.loaded_model(), limits, member.run.config.wire_dtype)
        size = declared_bytes(parts)
        if size > limits.max_request_bytes:
            raise InvalidRequest(f"the request's tensors take {size} bytes, at most {limits.max_request_bytes} are taken")
        if member.credit_requests_used >= limits.credit_requests or member.credit_bytes_used + size > limits.credit_bytes:
            raise OutOfCapacity(
                f"{member.credit_requests_used} requests and {member.credit_bytes_used} bytes are without an acknowledged "
                f"outcome, the credits are {limits.credit_requests} and {limits.credit_bytes}; acknowledge outcomes first"
            )
        self._registry.budget.reserve(Kind.REQUESTS, size, f"request {header.request_id}")
        member.credit_requests_used += 1
        member.credit_bytes_used += size
        member.running[header.request_id] = size
        incoming = allocate(header, opened, parts)
        incoming.deadline_s = header.deadline_ms / _MS_PER_S or limits.default_deadline_s
        loop = asyncio.get_running_loop()
        incoming.timer = loop.call_later(incoming.deadline_s, self._expire, header.request_id)
        self._incoming[header.request_id] = incoming

    def _expire(self, request_id: int) -> None:
        """The deadline passed before the request was complete."""
        incoming = self._incoming.pop(request_id, None)
        if incoming is not None:
            self._give_back(incoming)
            self._refused.add(request_id)
            self._fail(incoming.header, DeadlinePassed("the request's deadline passed before all of its frames came"))

    def _is_repeat(self, request_id: int) -> bool:
        """A request sent again after a reconnect: its stored outcome is sent again, or will come when it is ready."""
        member = self._member
        if request_id in member.outcomes:
            self._observer.duplicate()
            self._refused.add(request_id)
            self.send(member.outcomes[request_id].frames)
            return True
        if request_id in member.running and request_id not in self._incoming:
            self._observer.duplicate()
            self._refused.add(request_id)
            return True
        return False

    def _data(self, header: Header, payload: memoryview) -> None:
        if header.request_id in self._refused:
            return
        if header.request_id not in self._incoming:
            raise FrameError(f"DATA for request {header.request_id}, which is not open")
        self._incoming[header.request_id].add(header, payload)

    def _end(self, header: Header) -> None:
        if header.request_id in self._refused:
            self._refused.discard(header.request_id)
            return
        incoming = self._incoming.get(header.request_id)
        if incoming is None:
            raise FrameError(f"END for request {header.request_id}, which is not open")
        request = incoming.finish()
        del self._incoming[header.request_id]
        incoming.cancel_timer()
        direction = "forward" if isinstance(request, ForwardRequest) else "backward"
        taken_s = time.monotonic() - incoming.opened
        self._observer.stage(direction, "receive", taken_s)
        token = native.CancelToken(max(0.0, incoming.deadline_s - taken_s))
        self._member.cancels[header.request_id] = token
        task = asyncio.get_running_loop().create_task(self._run(incoming, token))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, incoming: IncomingRequest, token: native.CancelToken) -> None:
        header = incoming.header
        request = incoming.finish()
        try:
            if isinstance(request, ForwardRequest):
                y = await self._compute.forward(self._member, request, token)
                frames = self._result_frames(header, {Tensor.OUTPUT: y})
            else:
                dx, d_weights = await self._compute.backward(self._member, request, token)
                results = {Tensor.GRAD_ROUTING_WEIGHTS: d_weights, Tensor.GRAD_HIDDEN_STATES: dx}
                frames = self._result_frames(header, results)
        except ServerError as error:
            self._observer.rejected(error.code)
            frames = [self._error_frame(header, error)]
        except Exception:  # a fault of ours must reach the trainer as an outcome, or it would wait for ever
            fault = secrets.token_hex(4)
            _log.exception("fault %s in request %d", fault, header.request_id)
            frames = [self._error_frame(header, InternalError(f"internal fault {fault}; see the server's log"))]
        self._settle(header.request_id, incoming.size_bytes, frames)

    def _settle(self, request_id: int, request_bytes: int, frames: list[bytes]) -> None:
        member = self._member
        member.cancels.pop(request_id, None)
        self._registry.budget.release(Kind.REQUESTS, request_bytes)
        if not member.has_left:
            self._keep(request_id, frames, request_bytes)
            if member.sink is not None:
                member.sink.send(frames)
        member.finish(request_id)

    def _result_frames(self, header: Header, tensors: Mapping[Tensor, NDArray[Any]]) -> list[bytes]:
        begun = time.monotonic()
        base = Header(
            FrameType.RESULT, header.request_id, header.layer, header.op, tokens=header.tokens, hidden=header.hidden,
            epoch=header.epoch,
        )  # fmt: skip
        frames = [encode(base)]
        for tensor, values in tensors.items():
            dtype = Dtype.BF16 if values.dtype == np.uint16 else Dtype.FP32
            about = Header(
                FrameType.DATA, header.request_id, header.layer, header.op, tensor, dtype, header.tokens, header.hidden,
                epoch=header.epoch,
            )  # fmt: skip
            if values.nbytes:
                frames += tensor_frames(about, values.data.cast("B"))
        frames.append(encode(Header(FrameType.END, header.request_id, epoch=header.epoch)))
        direction = "forward" if header.op is Op.FORWARD else "backward"
        self._observer.stage(direction, "send", time.monotonic() - begun)
        return frames

    def _error_frame(self, header: Header, error: ServerError) -> bytes:
        detail = ErrorDetail(code=STATUS_NUMBERS[error.code], message=str(error)[:_MAX_ERROR_TEXT])
        payload = detail.SerializeToString()
        assert len(payload) <= MAX_PAYLOAD_BYTES  # noqa: S101  # bounded by _MAX_ERROR_TEXT
        return encode(Header(FrameType.ERROR, header.request_id, epoch=header.epoch), payload)

    def _fail(self, header: Header, error: ServerError) -> None:
        """An outcome for a request that was refused when it opened; it holds no credits."""
        self._observer.rejected(error.code)
        frames = [self._error_frame(header, error)]
        self._keep(header.request_id, frames, None)
        self.send(frames)

    def _keep(self, request_id: int, frames: list[bytes], credit_bytes: int | None) -> None:
        size = sum(len(frame) for frame in frames)
        self._registry.budget.record(Kind.OUTCOMES, size)
        self._member.outcomes[request_id] = Outcome(frames, size, credit_bytes)

    def _give_back(self, incoming: IncomingRequest) -> None:
        """A request that never became complete: its credits and memory return at once."""
        incoming.cancel_timer()
        member, size = self._member, incoming.size_bytes
        member.credit_requests_used -= 1
        member.credit_bytes_used -= size
        self._registry.budget.release(Kind.REQUESTS, size)
        member.finish(incoming.header.request_id)

    def _cancel(self, request_id: int) -> None:
        token = self._member.cancels.get(request_id)
        if token is not None:
            token.cancel()

    def _acknowledge(self, request_id: int) -> None:
        member = self._member
        outcome = member.outcomes.pop(request_id, None)
        if outcome is None and request_id <= member.last_request_id:
            return  # acknowledged before, as after a reconnect
        if outcome is None:
            raise FrameError(f"ACK for request {request_id}, which has no outcome to acknowledge")
        self._registry.budget.release(Kind.OUTCOMES, outcome.size_bytes)
        if outcome.credit_bytes is not None:
            member.credit_requests_used -= 1
            member.credit_bytes_used -= outcome.credit_bytes

    def _release(self, ticket_id: int) -> None:
        if ticket_id in self._member.tickets:
            self._registry.drop_ticket(self._member, ticket_id, "released by its trainer")
