"""One stream: its frames in, checked against what may come now, and what they mean for its member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.message import DecodeError
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameError, FrameType, Header, Op, Tensor
from kt_expert_proto.v1.session_pb2 import RequestOpen

from kt_expert_server.engine.buffers import BufferPool, PooledBuffer
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import DeadlinePassed, RequestCancelled, ServerError
from kt_expert_server.members.declare import declare
from kt_expert_server.members.limits import Limits
from kt_expert_server.members.replay_log import Entry
from kt_expert_server.members.requests import Requests
from kt_expert_server.members.run import Member
from kt_expert_server.members.runs import Runs
from kt_expert_server.model.loader import BaseModel
from kt_expert_server.observe.observer import Observer

_MS_PER_S = 1000
_PASSES = (Op.FORWARD, Op.BACKWARD)
# Computed with and nothing else, so it does no harm when a trainer changes them meanwhile. All others are copied before
# anybody looks at them.
_OF_ANY_VALUE = (Tensor.HIDDEN_STATES, Tensor.GRAD_OUTPUT)
_MAX_UNACKNOWLEDGED = 4  # outcomes of refused requests hold no credits; this many times the credits is a broken client


@dataclass(eq=False, slots=True)
class _Arriving:
    """A request whose tensors are on their way."""

    entry: Entry
    missing: dict[Tensor, tuple[Dtype, int, int]] = field(default_factory=dict)


class Exchange:
    """The frames of a joined stream. FrameError out of any method ends the stream; anything wrong with one request becomes
    that request's outcome and leaves the stream open."""

    def __init__(
        self, stream: int, member: Member, model: BaseModel, limits: Limits, runs: Runs, requests: Requests, pool: BufferPool,
        observer: Observer, now: Callable[[], float],
    ) -> None:  # fmt: skip
        self.stream = stream
        self.member = member
        self.is_stopping = False  # requests that come now are left to the next server
        self._epoch = member.epoch
        self._model, self._limits = model, limits
        self._runs, self._requests, self._pool, self._observer = runs, requests, pool, observer
        self._now = now  # the time of the event that is being handled
        self._arriving: _Arriving | None = None
        self._skipped = 0  # the refused or repeated request whose tensors are passed over

    def admit(self, header: Header, offered: PooledBuffer | None = None) -> PooledBuffer | None:
        """Memory for a tensor that is about to come, or that is there and is `offered`; None for one that is not wanted."""
        self._check(header)
        if header.request_id == self._skipped:
            return None
        arriving = self._arriving
        if arriving is None or header.request_id != arriving.entry.request_id:
            raise FrameError(f"tensor {header.tensor.name} came for request {header.request_id}, which takes none now")
        expected = arriving.missing.get(header.tensor)
        if expected != (header.dtype, header.rows, header.columns):
            raise FrameError(
                f"request {header.request_id} takes {_named(arriving.missing)}, got {header.tensor.name} {header.dtype.name} "
                f"[{header.rows}, {header.columns}]"
            )
        if offered is not None and header.tensor in _OF_ANY_VALUE:
            return offered
        return self._pool.take(header.tensor_bytes)

    def tensor(self, header: Header, buffer: PooledBuffer) -> None:
        arriving = self._arriving
        if arriving is None or header.request_id != arriving.entry.request_id:
            buffer.release()  # its request was refused while it came
            return
        del arriving.missing[header.tensor]
        arriving.entry.tensors[header.tensor] = buffer
        if not arriving.missing:
            self._complete(arriving.entry)

    def frame(self, header: Header, payload: bytes) -> None:
        """Any frame but JOIN and TENSOR."""
        self._check(header)
        match header.type:
            case FrameType.REQUEST:
                self._request(header, payload)
            case FrameType.CANCEL:
                self._cancel(header.request_id)
            case FrameType.ACK:
                if header.request_id <= self.member.log.acknowledged:
                    self._requests.answer_probe(self.member, header.request_id)
                self._require_sent(header.request_id)
                self._acknowledge(header.request_id)
                if self.member.is_leaving and not len(self.member.log):
                    self._runs.end_stream(self.member, None)
                    self._runs.remove(self.member)
            case FrameType.RELEASE:
                self.member.tickets.drop(header.request_id, "released by its trainer")
            case FrameType.JOIN:
                raise FrameError("a second JOIN on one stream")
            case _:
                raise FrameError(f"frame type {header.type.name} only travels from the server")

    def expire(self, now: float) -> None:
        """Refuses a request whose tensors did not come in time."""
        arriving = self._arriving
        if arriving is not None and now >= arriving.entry.deadline:
            self._refuse(arriving.entry, DeadlinePassed("the request's deadline passed before all of its tensors came"))

    def next_deadline(self) -> float | None:
        return None if self._arriving is None else self._arriving.entry.deadline

    def close(self) -> None:
        """The stream is gone. A request that was not complete never took effect and may be sent again."""
        arriving, self._arriving = self._arriving, None
        if arriving is not None:
            self._give_back(arriving.entry)

    def resume(self, acknowledged: int, tickets: list[int]) -> None:
        """What the trainer says it has; outcomes it lacks are sent again. Raises FrameError for what it cannot have."""
        self._acknowledge(acknowledged)
        self.member.tickets.keep_only(set(tickets), acknowledged, "released by its trainer while it had no connection")
        for entry in list(self.member.log):
            self._requests.send_outcome(self.member, entry)

    def _check(self, header: Header) -> None:
        if header.epoch != self._epoch:
            raise FrameError(f"frame of epoch {header.epoch} on a stream of epoch {self._epoch}")
        if self.member.stream != self.stream:
            raise FrameError("this stream was replaced by a newer one")

    def _request(self, header: Header, payload: bytes) -> None:
        if self._arriving is not None:
            raise FrameError(
                f"request {header.request_id} came before request {self._arriving.entry.request_id} had its "
                f"{_named(self._arriving.missing)}"
            )
        log, request_id = self.member.log, header.request_id
        if request_id <= log.received:
            self._repeat(request_id)
            return
        if self.is_stopping:  # not received, as if the stream had ended before: its trainer sends it again after that
            self._skipped = request_id
            return
        if len(log) >= _MAX_UNACKNOWLEDGED * self._limits.credit_requests:
            raise FrameError(f"{len(log)} outcomes are not acknowledged; acknowledge them as they come")
        try:
            opened = RequestOpen.FromString(payload)
        except DecodeError as error:
            raise FrameError(f"REQUEST {request_id} does not hold a RequestOpen: {error}") from None
        wait_s = header.deadline_ms / _MS_PER_S or self._limits.default_deadline_s
        now = self._now()
        entry = Entry(request_id, header, opened, now, now + min(wait_s, self._limits.max_deadline_s))
        try:
            missing = self._accept(entry)
        except ServerError as error:
            self._refuse(entry, error)
            return
        self._arriving = _Arriving(entry, missing)
        if not missing:
            self._complete(entry)

    def _accept(self, entry: Entry) -> dict[Tensor, tuple[Dtype, int, int]]:
        """Reserves the request's tensors and its results. Raises ServerError."""
        member = self.member
        declared = declare(entry.header, entry.opened, member.run, self._model, self._limits)
        what, owner = f"request {entry.request_id}", member.run.name
        size = declared.tensor_bytes + declared.result_bytes
        member.credits.take(size)
        entry.credit_bytes = size
        entry.held.add(self._runs.reclaim.reserve(Kind.REQUESTS, declared.tensor_bytes, owner, what))
        entry.outcome_held.add(self._runs.reclaim.reserve(Kind.OUTCOMES, declared.result_bytes, owner, f"the result of {what}"))
        return dict(declared.tensors)

    def _complete(self, entry: Entry) -> None:
        self._arriving, entry.complete_at = None, self._now()
        if entry.header.op in _PASSES:
            self._observer.stage(entry.header.op.name.lower(), "receive", entry.complete_at - entry.received_at)
        self.member.log.add(entry)
        self._requests.advance(self.member, self._model)

    def _refuse(self, entry: Entry, error: ServerError) -> None:
        """The request's outcome is the error, when its turn comes; tensors that still come are passed over."""
        self._observer.rejected(error.code)
        self._arriving, self._skipped = None, entry.request_id
        self._give_back(entry)
        entry.refusal = error
        self.member.log.add(entry)
        self._requests.advance(self.member, self._model)

    def _give_back(self, entry: Entry) -> None:
        entry.drop_tensors()
        entry.outcome_held.release()
        if entry.credit_bytes is not None:
            self.member.credits.give_back(entry.credit_bytes)
            entry.credit_bytes = None

    def _repeat(self, request_id: int) -> None:
        """Received before: its outcome has been sent on this stream too, or comes when it is ready."""
        self._observer.duplicate()
        self._skipped = request_id

    def _cancel(self, request_id: int) -> None:
        arriving = self._arriving
        if arriving is not None and arriving.entry.request_id == request_id:
            self._refuse(arriving.entry, RequestCancelled("the request was cancelled before it was complete"))
            return
        entry = self.member.log.find(request_id)
        if entry is not None:
            self._requests.cancel(self.member, entry)
            self._requests.advance(self.member, self._model)

    def _require_sent(self, up_to: int) -> None:
        """Raises FrameError for an outcome that is still on its way out: its memory would serve another trainer too early."""
        for entry in self.member.log:
            if entry.request_id <= up_to and entry.outcome is not None and entry.outcome.is_leaving:
                raise FrameError(f"outcome {entry.request_id} was acknowledged before all of it was sent")

    def _acknowledge(self, up_to: int) -> None:
        done = self.member.log.acknowledge(up_to)
        for entry in done:
            entry.drop_outcome()
            if entry.credit_bytes is not None:
                self.member.credits.give_back(entry.credit_bytes)
        if done:
            self._runs.acknowledged(self.member.run)


def _named(tensors: dict[Tensor, tuple[Dtype, int, int]]) -> str:
    each = [f"{tensor.name} {dtype.name} [{rows}, {columns}]" for tensor, (dtype, rows, columns) in tensors.items()]
    return ", ".join(each) or "no tensors"
