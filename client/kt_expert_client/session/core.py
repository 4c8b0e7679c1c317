"""The trainer's half of the protocol as a state machine: events and the time go in, actions come out.

It does no I/O, starts no threads, reads no clock and draws no random numbers. The driver (session/driver.py, or a simulator)
calls one method at a time and then carries out take_actions(), in order.
"""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError
from kt_expert_proto.codec import Buffer, Source
from kt_expert_proto.header import FrameError, FrameType, Header, Op, Tensor
from kt_expert_proto.v1.session_pb2 import ErrorDetail, Joined, Leave, RequestOpen, ResultHead

from kt_expert_client.errors import (
    Cancelled,
    DeadlineExceeded,
    KtExpertError,
    NotFound,
    OutOfCapacity,
    RunStateLost,
    ServerUnavailable,
    from_status,
)
from kt_expert_client.session.actions import Action, Connect, Disconnect, JoinTerms, Note, Phase, Send, Settled
from kt_expert_client.session.attempts import Attempts
from kt_expert_client.session.calls import Call
from kt_expert_client.session.inflight import InFlight
from kt_expert_client.session.journal import Journal
from kt_expert_client.session.recovery import loss_of, requests_to_repeat

_FAREWELL_S = 2.0  # for the server to take a rank back
# For a repeated request: its caller waits no more, but others whose outcomes come after it may.
_REPEAT_TIMEOUT_S = 3600.0
# A message may be lost on a connection that lives. While an outcome is waited for, one more message at least every so often
# shows the gap to the server, and the server's answer shows one to this side.
_PROBE_S = 10.0
_MS_PER_S = 1000


class SessionCore:
    """Takes calls, keeps them until their outcomes are known, whatever becomes of connections and servers meanwhile."""

    def __init__(
        self,
        terms: JoinTerms,
        journal: Journal,
        memory: Callable[[int, Call], Buffer],
        now: float,
        join_timeout_s: float,
    ) -> None:
        self.joined: Joined | None = None  # the latest answer
        self.failure: KtExpertError | None = None  # why the session has ended
        self._terms = terms
        self._journal = journal
        self._memory = memory  # for a result's tensor of so many bytes
        self._phase = Phase.APART
        self._attempts = Attempts(now, join_timeout_s)
        self._epoch = 0
        self._origin_step = 0  # of the run when this trainer came
        self._next_id = 1
        self._acknowledged = 0
        self._in_flight = InFlight()
        self._receiving: Call | None = None
        self._postponed: tuple[float, Call] | None = None  # refused for want of memory; asked for again at that time
        self._probe_at = now
        self._is_leaving = False
        # Why the session is about to end, once the server has let go of the rank or cannot be told.
        self._farewell: KtExpertError | None = None
        self._farewell_call: Call | None = None
        self._doomed: list[Call] = []  # calls that will get that error
        self._actions: list[Action] = []

    # What a trainer does

    @property
    def last_request_id(self) -> int:
        return self._next_id - 1

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def keeps_requests(self) -> bool:
        return self._journal.is_on

    def has_room(self, size_bytes: int) -> bool:
        """Whether a call of that size may be submitted now. True too when it would raise at once."""
        if self.failure is not None:
            return True
        if self.joined is None:
            return False
        return self._in_flight.has_room(size_bytes, self.joined)

    @property
    def is_steady(self) -> bool:
        """Joined, and nothing is on its way that changes what a forward computes with."""
        return (
            self._phase is Phase.JOINED
            and self._postponed is None
            and not any(call.changes_state for call in self._in_flight.calls.values())
        )

    def submit(self, call: Call, now: float) -> None:
        """Takes a call for which there is room. Raises why the session has ended, or OutOfCapacity."""
        if self.failure is not None:
            raise self.failure
        assert self.joined is not None  # noqa: S101  # has_room() was true
        if call.size_bytes > self.joined.credit_bytes:
            raise OutOfCapacity(
                f"the request's tensors take {call.size_bytes} bytes, this member may have {self.joined.credit_bytes} in "
                "flight; send fewer tokens at once"
            )
        call.deadline = now + call.timeout_s
        self._is_leaving = self._is_leaving or call.op is Op.LEAVE
        self._enter(call, now)

    def cancel(self, call: Call) -> None:
        """The outcome is no longer wanted; it comes all the same, as an error where the server had not begun."""
        if self._postponed is not None and self._postponed[1] is call:
            self._postponed = None
            self._first_outcome(call, Cancelled("the request was cancelled while it waited for memory; nothing was done"))
        elif call.is_sent and self._phase is Phase.JOINED:
            self._control(FrameType.CANCEL, call.request_id)

    def abandon(self, call: Call) -> None:
        """Nobody waits for its outcome any more: what it brings is let go of. Others may count on the request, so it is not
        cancelled."""
        if not call.is_given_up and call in list(self._in_flight):
            self._settled(call, Cancelled("the request was given up by its caller"))
            call.is_given_up = True

    def release(self, ticket: int) -> None:
        """The ticket will not be consumed. Where the server does not hear of it, the next join repairs that."""
        self._journal.released(ticket)
        if self._phase is Phase.JOINED:
            self._control(FrameType.RELEASE, ticket)

    def end(self, error: KtExpertError) -> None:
        """Gives up: all calls get the error."""
        if self.failure is not None:
            return
        self.failure, self._phase = error, Phase.ENDED
        self._actions.append(Disconnect())
        calls, self._doomed = self._doomed + self._in_flight.take_all(), []
        if self._postponed is not None:
            calls, self._postponed = [*calls, self._postponed[1]], None
        self._receiving = None
        for call in calls:
            call.drop_results()
            call.on_unneeded(call)
            if not call.is_replay and not call.is_given_up and call is not self._farewell_call:
                self._settled(call, error)
        self._journal.clear()

    def _end_politely(self, error: KtExpertError, now: float) -> None:
        """Ends, but gives the rank back first: whoever hears of the error may open the run again at once."""
        if self._farewell is not None or self.failure is not None:
            return
        self._farewell = error
        self._doomed += self._in_flight.take_unsent()
        self._farewell_call = Call(Op.LEAVE, RequestOpen(leave=Leave()), _FAREWELL_S)
        self.submit(self._farewell_call, now)

    # What the transport and the clock do

    def admit(self, header: Header, offered: Buffer | None = None) -> Buffer | None:
        """Memory for a result's tensor, or `offered`, which has it already. Raises FrameError for one that is not expected."""
        call = self._receiving
        self._check(header)
        expected = None if call is None or header.request_id != call.request_id else call.expects.get(header.tensor)
        if call is None or expected != header.tensor_bytes or header.tensor in call.results:
            raise FrameError(
                f"tensor {header.tensor.name} of {header.tensor_bytes} bytes came for request {header.request_id}, which "
                f"expects {'nothing' if call is None else _named(call.expects)}"
            )
        return self._memory(header.tensor_bytes, call) if offered is None else offered

    def received(self, header: Header, payload: bytes | Buffer, now: float) -> None:
        """A whole frame. Raises FrameError for one that may not come now; the transport is then of no more use."""
        self._check(header)
        if not isinstance(payload, bytes):
            self._tensor(header, payload, now)
            return
        try:
            match header.type:
                case FrameType.JOINED:
                    self._on_joined(Joined.FromString(payload), now)
                case FrameType.RESULT:
                    self._result(header, ResultHead.FromString(payload), now)
                case FrameType.ERROR:
                    self._error(header, ErrorDetail.FromString(payload), now)
                case FrameType.ACK:
                    pass  # the answer to a probe: nothing is missing before it
                case _:
                    raise FrameError(f"frame type {header.type.name} only travels to the server")
        except DecodeError as error:
            raise FrameError(f"{header.type.name} of request {header.request_id} cannot be read: {error}") from None

    def disconnected(self, error: KtExpertError, now: float) -> None:
        """The transport has ended."""
        if self._phase in (Phase.ENDED, Phase.APART):
            return
        if self._farewell is not None:
            self.end(self._farewell)
            return
        was_joined = self._phase is Phase.JOINED
        self._phase, self._receiving = Phase.APART, None
        self._in_flight.cut()
        if was_joined:
            self._attempts.lost(now)
        if was_joined and not self._is_leaving:
            self._actions.append(Note(f"connection lost ({error}); connecting again"))
        if isinstance(error, NotFound) and self._is_leaving:
            self._left()
            return
        if not self._attempts.failed(error, now):
            self.end(error)

    def tick(self, now: float) -> None:
        """Time has passed: at least as often as next_deadline() says."""
        farewell = self._farewell_call
        if farewell is not None and self._farewell is not None and now >= farewell.deadline:
            self.end(self._farewell)
        for call in self._in_flight.overdue(now):
            self._give_up(call, now)
        if self._postponed is not None and now >= self._postponed[0]:
            call, self._postponed = self._postponed[1], None
            self._enter(call, now)
        if self._is_probing() and now >= self._probe_at:
            self._control(FrameType.ACK, self._acknowledged)
            self._probe_at = now + _PROBE_S
        if self._phase is Phase.APART and now >= self._attempts.at:
            self._connect()

    def _is_probing(self) -> bool:
        return self._phase is Phase.JOINED and self._in_flight.has_sent

    def next_deadline(self) -> float | None:
        """When tick() is due, if nothing else happens."""
        if self._phase is Phase.ENDED:
            return None
        times = [self._in_flight.next_deadline(), None if self._postponed is None else self._postponed[0]]
        if self._phase is Phase.APART:
            times.append(self._attempts.at)
        if self._is_probing():
            times.append(self._probe_at)
        if self._farewell_call is not None:
            times.append(self._farewell_call.deadline)
        return min((each for each in times if each is not None), default=None)

    def take_actions(self) -> list[Action]:
        """Everything decided since the last call."""
        actions, self._actions = self._actions, []
        return actions

    # Connecting

    def _connect(self) -> None:
        self._phase = Phase.JOINING
        self._epoch += 1
        self._actions.append(Connect())
        wanted = self._journal.tickets | self._in_flight.tickets()
        join = self._terms.join(
            0 if self.joined is None else self.joined.born,
            self._acknowledged,
            sorted(ticket for ticket in wanted if ticket <= self._acknowledged),
            resume_only=self._is_leaving,
        )
        self._emit(Header(FrameType.JOIN, epoch=self._epoch), join.SerializeToString())

    def _on_joined(self, joined: Joined, now: float) -> None:
        if self._phase is not Phase.JOINING:
            raise FrameError("a second JOINED on one stream")
        is_first, self.joined = self.joined is None, joined
        if is_first:
            self._origin_step = int(joined.step)
        self._phase = Phase.JOINED
        self._attempts.joined()
        if not is_first:
            self._actions.append(Note(f"connected again after {now - self._attempts.apart_since:.1f} s"))
        for call in self._in_flight:
            if call.is_given_up and call.request_id > joined.received:
                self._forget(call)  # it never took effect
        self._journal.durable(joined.durable)
        if joined.resumed:
            self._in_flight.resume(joined.received)
        elif not self._begin_afresh(joined, now):
            return
        self._pump(now)

    def _begin_afresh(self, joined: Joined, now: float) -> bool:
        """The server has neither tickets nor gradients nor outcomes of this trainer. False where that is a loss for good."""
        self._acknowledged = 0
        for call in self._in_flight.take_replays():
            self._let_go(call)
        overtaken = [call for call in self._in_flight if call.request_id <= joined.included]
        are_known = [self._settle_step(call, joined) for call in overtaken]
        repeated = requests_to_repeat(joined, self._journal, self._origin_step, is_beyond=not all(are_known))
        self._in_flight.begin_afresh(repeated or ())
        if repeated is None:
            self._end_politely(loss_of(joined, self._journal, self._terms.rank, self._terms.run), now)
        elif repeated:
            self._actions.append(Note(f"the server began anew from step {joined.step}; repeating {len(repeated)} requests"))
        return repeated is not None

    def _settle_step(self, call: Call, joined: Joined) -> bool:
        """A step whose outcome was lost with the member, but which the state holds: what became of it is known all the same."""
        if call.op is not Op.STEP or call.opened.step.step > joined.step:
            return False
        self._in_flight.remove(call)
        call.head = ResultHead(step=call.opened.step.step)
        self._journal.settled(call)
        if not call.is_given_up:
            self._settled(call, None)
        return True

    def _left(self) -> None:
        """The server does not know this trainer any more, and that was the purpose."""
        for call in self._in_flight:
            if call.op is Op.LEAVE and not call.is_given_up:
                call.head = ResultHead()
                self._forget(call)
                self._settled(call, None)
        self.end(ServerUnavailable("this trainer has left its run"))

    # Calls

    def _enter(self, call: Call, now: float) -> None:
        call.request_id, self._next_id = self._next_id, self._next_id + 1
        self._in_flight.add(call)
        self._pump(now)

    def _pump(self, now: float) -> None:
        """Sends what the server has credits for."""
        if self._phase is not Phase.JOINED or self.joined is None:
            return
        while (call := self._in_flight.take_sendable(self.joined)) is not None:
            self._send(call, now)

    def _send(self, call: Call, now: float) -> None:
        self._probe_at = now + _PROBE_S
        if call.stamps is not None:
            call.stamps.sent = now
        left_s = _REPEAT_TIMEOUT_S if call.is_replay else call.deadline - now
        if call.is_replay and call.op is Op.STEP:
            call.opened.step.patient = True  # others may be on their way back, too
        for header, payload in call.frames(max(1, int(left_s * _MS_PER_S)), self._epoch):
            self._emit(header, payload)

    def _result(self, header: Header, head: ResultHead, now: float) -> None:
        call = self._outcome_of(header)
        call.head = head
        if call.expects:
            self._receiving = call
        else:
            self._settle(call, now)

    def _tensor(self, header: Header, buffer: Buffer, now: float) -> None:
        call = self._receiving
        if call is None or call.request_id != header.request_id:
            buffer.release()
            raise FrameError(f"tensor {header.tensor.name} ended for request {header.request_id}, which expects none")
        call.results[header.tensor] = buffer
        if len(call.results) == len(call.expects):
            self._receiving = None
            self._settle(call, now)

    def _error(self, header: Header, detail: ErrorDetail, now: float) -> None:
        call = self._outcome_of(header)
        call.error = from_status(detail.code, detail.message, detail.retry_delay_ms / _MS_PER_S)
        self._settle(call, now)

    def _outcome_of(self, header: Header) -> Call:
        if self._receiving is not None:
            raise FrameError(f"an outcome came before that of request {self._receiving.request_id} was complete")
        return self._in_flight.outcome_of(header)

    def _settle(self, call: Call, now: float) -> None:
        assert call.request_id > self._acknowledged, f"request {call.request_id} was settled twice"  # noqa: S101
        self._in_flight.remove(call)
        self._acknowledged = call.request_id
        # The acknowledgement goes out before anything that uses the credit it returns.
        self._control(FrameType.ACK, call.request_id)
        if self._farewell is not None:
            self._settle_doomed(call)
            return
        if call.is_replay:
            self._repeated(call, now)
            call.is_replay = False
            self._let_go(call)
            self._release_repeated(call)
        elif not self._is_to_wait(call, now):
            self._first_outcome(call, call.error)
        if call.head is not None:
            self._journal.durable(call.head.durable)
        self._pump(now)

    def _release_repeated(self, call: Call) -> None:
        """A repeated backward that left its ticket to others: they have come and gone before."""
        ticket = call.ticket if call.opened.backward.keep_ticket else 0
        if ticket and ticket not in self._journal.tickets and ticket not in self._in_flight.tickets():
            self._control(FrameType.RELEASE, ticket)

    def _is_to_wait(self, call: Call, now: float) -> bool:
        """Whether a refused call is asked for again, as the server says. Not where others came after it, which may count on
        it, and not where the time is up."""
        error = call.error
        if not isinstance(error, OutOfCapacity) or not error.retry_delay_s or call.is_given_up or self._in_flight.calls:
            return False
        at = now + error.retry_delay_s
        if self._postponed is not None or at >= call.deadline:
            return False
        self._actions.append(Note(f"{call.op.name} is asked for again in {error.retry_delay_s:.1f} s: {error}"))
        self._postponed, call.error = (at, call), None
        return True

    def _first_outcome(self, call: Call, error: KtExpertError | None) -> None:
        if error is None:
            self._journal.settled(call)
        else:
            call.on_unneeded(call)
        if not call.is_given_up:
            self._settled(call, error)
            return
        call.is_given_up = False
        call.drop_results()
        if call.keeps_ticket and error is None:
            self.release(call.request_id)

    def _settle_doomed(self, call: Call) -> None:
        """Outcomes that come while the session ends are not wanted any more."""
        call.drop_results()
        self._doomed.append(call)
        if call is self._farewell_call and self._farewell is not None:
            self.end(self._farewell)

    def _repeated(self, call: Call, now: float) -> None:
        """A request that had succeeded before has an outcome again; it is the same one, or the state cannot be had back."""
        call.drop_results()
        if call.error is not None and self.joined is not None:
            error, call.error = call.error, None
            loss = RunStateLost(f"what the server lost could not be repeated: {error}", step=int(self.joined.step))
            self._end_politely(loss, now)
            return
        wanted = self._journal.tickets | self._in_flight.tickets()
        if call.keeps_ticket and call.request_id not in wanted:
            self._control(FrameType.RELEASE, call.request_id)

    def _give_up(self, call: Call, now: float) -> None:
        what = f"request {call.request_id} has no outcome after {call.timeout_s:g} s"
        error: KtExpertError = DeadlineExceeded(f"{what}: the server is slow; look at its /metrics")
        if self._phase is not Phase.JOINED:
            apart_s = now - self._attempts.apart_since
            why = f"there has been no connection for {apart_s:.0f} s ({self._attempts.last_error})"
            error = ServerUnavailable(f"{what}: {why}")
        self._settled(call, error)
        call.is_given_up = True
        if call.is_sent:
            self._control(FrameType.CANCEL, call.request_id)
        elif call in self._in_flight.unsent:
            self._in_flight.unsent.remove(call)
            self._forget(call)

    def _forget(self, call: Call) -> None:
        self._in_flight.remove(call)
        call.drop_results()
        call.on_unneeded(call)

    def _let_go(self, call: Call) -> None:
        """What was dropped from the journal while it was being repeated."""
        if not self._journal.keeps(call):
            call.on_unneeded(call)

    def _settled(self, call: Call, error: KtExpertError | None) -> None:
        """Its results are its caller's from now on: a repetition has results of its own."""
        results = {}
        if error is None:
            results, call.results = call.results, {}
        self._actions.append(Settled(call, error, results))

    def _check(self, header: Header) -> None:
        if header.epoch != self._epoch:
            raise FrameError(f"frame of epoch {header.epoch} on a stream of epoch {self._epoch}")
        if self._phase is Phase.JOINING and header.type is not FrameType.JOINED:
            raise FrameError(f"{header.type.name} came before JOINED")

    def _control(self, kind: FrameType, request_id: int) -> None:
        self._emit(Header(kind, request_id, epoch=self._epoch), b"")

    def _emit(self, header: Header, payload: bytes | Source) -> None:
        self._actions.append(Send(header, payload))


def _named(expects: dict[Tensor, int]) -> str:
    return ", ".join(f"{size} bytes of {tensor.name}" for tensor, size in expects.items()) or "none"
