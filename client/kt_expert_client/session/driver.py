"""Connects the session's core to threads, to the clock and to a transport."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time

from kt_expert_proto.codec import Buffer, Outbound
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.v1.session_pb2 import Leave, RequestOpen

from kt_expert_client.errors import DeadlineExceeded, KtExpertError, ServerFault, ServerUnavailable, WrongPhase, copy_of
from kt_expert_client.session.actions import Action, Connect, Disconnect, Note, Phase, Send, Settled
from kt_expert_client.session.calls import Call
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.inflight import ANSWER_SLACK_S
from kt_expert_client.waiting import SILENT_S
from kt_expert_client.wire.base import Opener, Transport
from kt_expert_client.wire.fast_path import FastPath

_log = logging.getLogger(__name__)
_LEAVE_TIMEOUT_S = 10.0
_LEAVE_GRACE_S = 2.0  # for the server to end the stream after the last outcome
_LOCAL_SLACK_S = 5.0  # beyond what the core allows itself, for its thread to get the GIL


class Pending:
    """One call in flight, as its caller sees it."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.error: KtExpertError | None = None
        self.results: dict[Tensor, Buffer] = {}
        self.done = threading.Event()

    @property
    def request_id(self) -> int:
        return self.call.request_id

    def wait(self, timeout_s: float | None = None, *, waits_for: str = "") -> None:
        """Raises the request's error, or DeadlineExceeded where no outcome came in time. `waits_for`, what is to happen first,
        is said once it takes long."""
        most = self.call.timeout_s + ANSWER_SLACK_S + _LOCAL_SLACK_S
        if waits_for and not self.done.wait(SILENT_S):
            _log.warning("waiting for %s", waits_for)
        if not self.done.wait(most if timeout_s is None else min(timeout_s, most)):
            raise DeadlineExceeded(f"request {self.request_id} has no outcome yet; wait longer, or cancel it")
        if self.error is not None:
            raise copy_of(self.error)


class _Link:
    """One transport's receiver. What an older transport still says is not heard."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.transport: Transport | None = None

    def admit(self, header: Header, offered: Buffer | None = None) -> Buffer | None:
        return self._session._admit(self, header, offered)

    def deliver(self, header: Header, payload: bytes | Buffer) -> None:
        self._session._deliver(self, header, payload)

    def on_end(self, error: KtExpertError) -> None:
        self._session._ended(self, error)


class Session:
    """Any thread may submit. Outcomes are matched on the transport's thread, connections made on the session's own."""

    def __init__(self, core: SessionCore, opener: Opener, name: str) -> None:
        self._core = core
        self._opener = opener
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)  # for callers: credits, the join, the end
        self._clock = threading.Condition(self._lock)  # for the thread that keeps time
        self._waits_until: float | None = 0.0  # how long that thread sleeps; None: until it is told
        self._link: _Link | None = None
        self._pending: dict[Call, Pending] = {}
        # Tickets are released by finalizers, which may run in the middle of anything; this queue's put is safe even there.
        self._releases: queue.SimpleQueue[int | Pending | None] = queue.SimpleQueue()
        self._is_carrying_out = False
        self._pid = os.getpid()
        self._threads = [
            threading.Thread(target=target, name=f"kt-expert-{role}-{name}", daemon=True)
            for role, target in (("session", self._keep_time), ("release", self._release_all))
        ]

    def start(self, timeout_s: float) -> None:
        """Joins the run. Raises why that is impossible, or DeadlineExceeded; nothing of the session is left then."""
        for thread in self._threads:
            thread.start()
        try:
            self._wait_until_joined(timeout_s)
        except KtExpertError:
            self.close()
            raise
        except BaseException:  # an interrupt from the keyboard: the rank may be there already
            self.leave()
            raise

    def _wait_until_joined(self, timeout_s: float) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._core.joined is not None or self._core.failure is not None, timeout_s)
            if self._core.failure is not None:
                raise copy_of(self._core.failure)
            if self._core.joined is None:
                raise DeadlineExceeded(f"the run was not joined within {timeout_s:g} s")

    @property
    def keeps_requests(self) -> bool:
        """Whether a request's tensors are needed after its outcome, to repeat it."""
        return self._core.keeps_requests

    @property
    def core(self) -> SessionCore:
        return self._core

    def submit(self, call: Call) -> Pending:
        """Waits for credits, then sends. Raises OutOfCapacity, DeadlineExceeded, why the session has ended, or WrongPhase in
        a forked child: connection and threads are its parent's."""
        if os.getpid() != self._pid:
            raise WrongPhase(f"this run was opened by process {self._pid}, of which {os.getpid()} is a fork; open one here")
        pending = Pending(call)
        deadline = time.monotonic() + call.timeout_s
        with self._lock:
            if not self._changed.wait_for(lambda: self._core.has_room(call.size_bytes), call.timeout_s):
                raise DeadlineExceeded(f"no credits were free within {call.timeout_s:g} s; the server does not keep up")
            if self._core.failure is not None:
                raise copy_of(self._core.failure)
            call.timeout_s = max(0.0, deadline - time.monotonic())
            self._pending[call] = pending
            try:
                self._core.submit(call, time.monotonic())
            except KtExpertError:
                del self._pending[call]
                raise
            self._carry_out()
        return pending

    def fast_path(self) -> FastPath | None:
        """For a forward that keeps nothing, where it may be asked for now: what was submitted before comes first."""
        with self._lock:
            link = self._link
            if link is None or link.transport is None or not self._core.is_steady or os.getpid() != self._pid:
                return None
            return link.transport.fast_path

    def cancel(self, call: Call) -> None:
        with self._lock:
            self._core.cancel(call)
            self._carry_out()

    def release(self, ticket: int) -> None:
        """Tells the server, soon, that a ticket will not be consumed. Never waits and never fails."""
        self._releases.put(ticket)

    def abandon(self, pending: Pending) -> None:
        """Soon, nobody waits for that outcome any more. Never waits and never fails."""
        self._releases.put(pending)

    def leave(self) -> None:
        """Gives the rank back. Safe to call twice; a server that cannot be reached frees the rank by its lease. Does nothing
        in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            is_in = self._core.failure is None and self._core.joined is not None
        if is_in:
            try:
                self.submit(Call(Op.LEAVE, RequestOpen(leave=Leave()), _LEAVE_TIMEOUT_S)).wait(_LEAVE_TIMEOUT_S)
            except KtExpertError as error:
                _log.debug("leaving: %s", error)
            with self._lock:  # the server ends the stream once it has let go of everything
                self._changed.wait_for(lambda: self._link is None or self._core.phase is not Phase.JOINED, _LEAVE_GRACE_S)
        self.close()

    def close(self) -> None:
        """Ends at once, without a word to the server. Does nothing in a forked child."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._core.end(ServerUnavailable("the session was closed by this trainer"))
            self._carry_out()

    def _release_all(self) -> None:
        while (unwanted := self._releases.get()) is not None:
            with self._lock:
                if isinstance(unwanted, int):
                    self._core.release(unwanted)
                elif unwanted.done.is_set():
                    self._drop(unwanted)
                else:
                    self._core.abandon(unwanted.call)
                self._carry_out()

    def _drop(self, settled: Pending) -> None:
        """An outcome that nobody has looked at."""
        for buffer in settled.results.values():
            buffer.release()
        if settled.error is None and settled.call.keeps_ticket:
            self._core.release(settled.request_id)

    def _keep_time(self) -> None:
        with self._lock:
            while True:
                try:
                    self._core.tick(time.monotonic())
                    self._carry_out()
                except Exception as error:  # without this thread, callers would wait for their own deadlines
                    _log.exception("a fault of the client's own")
                    self._core.end(ServerFault(f"a fault of the client's own, see its log: {error!r}"))
                    self._carry_out()
                self._waits_until = self._core.next_deadline()
                if self._core.phase is Phase.ENDED:
                    break
                self._clock.wait(None if self._waits_until is None else max(0.0, self._waits_until - time.monotonic()))
        self._releases.put(None)

    def _admit(self, link: _Link, header: Header, offered: Buffer | None) -> Buffer | None:
        with self._lock:
            return self._core.admit(header, offered) if link is self._link else None

    def _deliver(self, link: _Link, header: Header, payload: bytes | Buffer) -> None:
        with self._lock:
            if link is not self._link:
                if not isinstance(payload, bytes):
                    payload.release()
                return
            self._core.received(header, payload, time.monotonic())
            self._carry_out()
            if header.type is not FrameType.TENSOR or self._core.phase is Phase.ENDED:
                self._changed.notify_all()

    def _ended(self, link: _Link, error: KtExpertError) -> None:
        with self._lock:
            if link is not self._link:
                return
            self._link = None
            self._core.disconnected(error, time.monotonic())
            self._carry_out()
            self._changed.notify_all()

    def _carry_out(self) -> None:
        """Called with the lock held."""
        if self._is_carrying_out:
            return  # a transport called back; the loop below goes on
        self._is_carrying_out = True
        try:
            while actions := self._core.take_actions():
                self._act_on(actions)
        finally:
            self._is_carrying_out = False
        # Threads are woken only for what concerns them: each wake-up costs others their turn at the interpreter.
        deadline = self._core.next_deadline()
        if self._core.phase is Phase.ENDED or (
            deadline is not None and (self._waits_until is None or deadline < self._waits_until)
        ):
            self._clock.notify()

    def _act_on(self, actions: list[Action]) -> None:
        """Frames of one connection are sent together, and callers that wait are woken before that: they need the lock for
        whatever comes next."""
        frames: list[Outbound] = []
        for action in actions:
            if isinstance(action, Send):
                frames.append((action.header, action.payload))
                continue
            if isinstance(action, Connect | Disconnect):
                self._send(frames)
                frames = []
            self._act(action)
        self._send(frames)

    def _send(self, frames: list[Outbound]) -> None:
        if frames and self._link is not None and self._link.transport is not None:
            self._link.transport.send(frames)

    def _act(self, action: Connect | Disconnect | Settled | Note) -> None:
        match action:
            case Connect():
                self._disconnect()
                link = self._link = _Link(self)
                try:
                    link.transport = self._opener(link)
                except Exception as error:  # a channel that was closed, a token that cannot be read
                    self._link = None
                    self._core.disconnected(ServerFault(f"no connection could be begun: {error}"), time.monotonic())
            case Disconnect():
                self._disconnect()
            case Settled():
                pending = self._pending.pop(action.call)
                pending.error, pending.results = action.error, action.results
                if action.call.stamps is not None:
                    action.call.stamps.settled = time.monotonic()
                action.call.on_settled(action.call)
                pending.done.set()
                self._changed.notify_all()
            case Note():
                _log.warning("%s", action.text)

    def _disconnect(self) -> None:
        self._changed.notify_all()
        link, self._link = self._link, None
        if link is not None and link.transport is not None:
            link.transport.close()
