"""Requests in flight on one transport: ids, credits, and matching outcomes to their waiters."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from kt_expert_proto.frame import (
    Dtype,
    FrameError,
    FrameType,
    Header,
    Tensor,
    decode,
    encode,
    tensor_frames,
)
from kt_expert_proto.v1.session_pb2 import ErrorDetail, RequestOpen

from kt_expert_client.errors import (
    DeadlineExceeded,
    KtExpertError,
    OutOfCapacity,
    ServerFault,
    from_status,
)
from kt_expert_client.staging import HostTensor, byte_view
from kt_expert_client.transport.base import Transport

_ANSWER_SLACK_S = 5.0  # the server enforces the deadline; this is for its answer to travel
_MS_PER_S = 1000


@dataclass(slots=True)
class Pending:
    """One request without an outcome yet. `results` are the host tensors its outcome fills."""

    request_id: int
    size_bytes: int
    deadline: float
    results: dict[Tensor, torch.Tensor]
    on_done: Callable[[], None]
    received: dict[Tensor, int] = field(default_factory=dict)
    error: KtExpertError | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_s: float | None = None) -> None:
        """Raises the request's error, or DeadlineExceeded where no outcome came in time."""
        left = self.deadline + _ANSWER_SLACK_S - time.monotonic()
        if not self.done.wait(max(0.0, left if timeout_s is None else min(timeout_s, left))):
            raise DeadlineExceeded(
                f"request {self.request_id} has no outcome yet; the server is slow or unreachable, look at its /metrics"
            )
        if self.error is not None:
            raise self.error


@dataclass(frozen=True, slots=True)
class Credits:
    """What may be in flight, as the server said when the member joined."""

    requests: int
    size_bytes: int


class Session:
    """Implements FrameReceiver. Any thread may submit; outcomes are matched on the transport's thread."""

    def __init__(self, transport: Transport, epoch: int, credits_: Credits, last_request_id: int) -> None:
        self._transport = transport
        self._epoch = epoch
        self._credits = credits_
        self._lock = threading.Condition()
        self._pending: dict[int, Pending] = {}
        self._used_bytes = 0
        self._next_id = last_request_id + 1
        self._failure: KtExpertError | None = None
        transport.start(self)

    @property
    def last_request_id(self) -> int:
        with self._lock:
            return self._next_id - 1

    def submit(
        self,
        header: Header,
        opened: RequestOpen,
        tensors: dict[Tensor, tuple[Dtype, HostTensor]],
        results: dict[Tensor, torch.Tensor],
        timeout_s: float,
        on_done: Callable[[], None],
    ) -> Pending:
        """Waits for credits, then queues the request's frames. Raises OutOfCapacity, DeadlineExceeded, or the session's end."""
        size = sum(host.tensor.nbytes for _, host in tensors.values())
        if size > self._credits.size_bytes:
            raise OutOfCapacity(
                f"the request's tensors take {size} bytes, this member may have {self._credits.size_bytes} in flight; send "
                "fewer tokens at once"
            )
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if not self._lock.wait_for(lambda: self._has_room(size), timeout_s):
                raise DeadlineExceeded(f"no credits were free within {timeout_s:g} s; the server does not keep up")
            self._raise_if_ended()
            request_id = self._next_id
            self._next_id += 1
            pending = Pending(request_id, size, deadline, results, on_done)
            self._pending[request_id] = pending
            self._used_bytes += size
            # Queued under the lock: ids must reach the server in order.
            self._transport.send(self._frames(request_id, header, opened, tensors, timeout_s))
        return pending

    def cancel(self, request_id: int) -> None:
        self._control(FrameType.CANCEL, request_id)

    def release(self, ticket: int) -> None:
        """Tells the server that a ticket will not be consumed. Does nothing on an ended session."""
        self._control(FrameType.RELEASE, ticket)

    def close(self) -> None:
        self._transport.close()

    def on_frame(self, message: bytes) -> None:
        try:
            for header, payload in decode(message):
                self._deliver(header, payload)
        except FrameError as error:
            self.on_end(ServerFault(f"the server sent a malformed frame: {error}"))
            self._transport.close()

    def on_end(self, error: KtExpertError) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = error
            pending = list(self._pending.values())
            self._pending.clear()
            self._used_bytes = 0
            self._lock.notify_all()
        for request in pending:
            self._finish(request, error)

    def _has_room(self, size: int) -> bool:
        if self._failure is not None:
            return True
        return len(self._pending) < self._credits.requests and self._used_bytes + size <= self._credits.size_bytes

    def _raise_if_ended(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))

    def _frames(
        self,
        request_id: int,
        header: Header,
        opened: RequestOpen,
        tensors: dict[Tensor, tuple[Dtype, HostTensor]],
        timeout_s: float,
    ) -> Iterator[bytes]:
        yield encode(
            Header(
                FrameType.OPEN,
                request_id,
                header.layer,
                header.op,
                Tensor.NONE,
                header.dtype,
                header.tokens,
                header.hidden,
                deadline_ms=max(1, int(timeout_s * _MS_PER_S)),
                epoch=self._epoch,
            ),
            opened.SerializeToString(),
        )
        for tensor, (dtype, host) in tensors.items():
            piece = Header(
                FrameType.DATA, request_id, header.layer, header.op, tensor, dtype, header.tokens, header.hidden,
                epoch=self._epoch,
            )  # fmt: skip
            if host.tensor.numel():
                yield from tensor_frames(piece, host.view())
        yield encode(Header(FrameType.END, request_id, header.layer, header.op, epoch=self._epoch))

    def _control(self, kind: FrameType, request_id: int) -> None:
        if self._failure is None:
            self._transport.send([encode(Header(kind, request_id, epoch=self._epoch))])

    def _deliver(self, header: Header, payload: memoryview) -> None:
        with self._lock:
            pending = self._pending.get(header.request_id)
        if pending is None:
            return
        match header.type:
            case FrameType.RESULT:
                return
            case FrameType.DATA:
                _fill(pending, header, payload)
            case FrameType.END:
                missing = [t.name for t, value in pending.results.items() if pending.received.get(t, 0) != value.nbytes]
                self._settle(pending, FrameError(f"outcome lacks bytes of {missing}") if missing else None)
            case FrameType.ERROR:
                detail = ErrorDetail.FromString(bytes(payload))
                self._settle(pending, None, from_status(detail.code, detail.message))
            case _:
                raise FrameError(f"frame type {header.type.name} only travels to the server")

    def _settle(self, pending: Pending, broken: FrameError | None, error: KtExpertError | None = None) -> None:
        if broken is not None:
            raise broken
        with self._lock:
            self._pending.pop(pending.request_id, None)
            self._used_bytes -= pending.size_bytes
            # The acknowledgement goes out before anything that uses the credit it returns.
            self._control(FrameType.ACK, pending.request_id)
            self._lock.notify_all()
        self._finish(pending, error)

    @staticmethod
    def _finish(pending: Pending, error: KtExpertError | None) -> None:
        pending.error = error
        pending.on_done()
        pending.done.set()


def _fill(pending: Pending, header: Header, payload: memoryview) -> None:
    target = pending.results.get(header.tensor)
    received = pending.received.get(header.tensor, 0)
    if target is None or header.offset != received or received + payload.nbytes > target.nbytes:
        raise FrameError(f"outcome of request {header.request_id} has an unexpected piece of {header.tensor.name}")
    view = byte_view(target)
    view[received : received + payload.nbytes] = payload
    pending.received[header.tensor] = received + payload.nbytes
