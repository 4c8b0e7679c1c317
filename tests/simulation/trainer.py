"""A simulated trainer process: the product's session core, and a training loop that is a generator of calls."""

from __future__ import annotations

import random
from collections.abc import Callable

from kt_expert_client.errors import AlreadyExists, KtExpertError, RunStateLost, ServerFault, ServerUnavailable, from_status
from kt_expert_client.session.actions import Connect, Disconnect, JoinTerms, Send, Settled
from kt_expert_client.session.calls import Call
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.journal import Journal
from kt_expert_proto.codec import Buffer, Decoder, Encoder, Outbound
from kt_expert_proto.header import FrameError, Header, Op, Tensor
from kt_expert_proto.shared import Place
from kt_expert_proto.status import STATUS_NUMBERS

from simulation.calls import TIMEOUT_S
from simulation.heap import EventHeap
from simulation.network import Connection
from simulation.sockets import Bites
from simulation.training import Plan, Script, Training

_REPLAY_BYTES = 1 << 24


class _Memory:
    """Implements Buffer."""

    def __init__(self, size: int, counter: TrainerProcess) -> None:
        self.view = memoryview(bytearray(size))
        self._counter = counter
        counter.buffers += 1

    def release(self) -> None:
        self._counter.buffers -= 1


class TrainerProcess:
    """Trains until it is done, whatever happens to it."""

    def __init__(
        self,
        heap: EventHeap,
        rng: random.Random,
        plan: Plan,
        connect: Callable[[TrainerProcess], Connection | None],
        may_leave: Callable[[Plan], bool],
    ) -> None:
        self._heap, self._rng, self.plan, self._connect = heap, rng, plan, connect
        self._may_leave = lambda: may_leave(plan)
        self.generation = 0
        self.paused_until = 0.0
        self.is_done = False
        self.losses = 0  # times the server lost what this trainer had done
        self.restarts = 0
        self.was_paused_long = False
        self.went_ahead = 0  # steps asked for before the outcome of a forward was there
        self.failure: str = ""
        self.buffers = 0
        self.results: dict[Tensor, Buffer] = {}  # of the latest outcome
        self.reads: dict[int, str] = {}  # what its lives have read of the adapter, by step
        self.start()

    @property
    def has_trained(self) -> bool:
        """All steps; it leaves when all ranks of its run have."""
        return self._training.has_trained

    def start(self) -> None:
        """A new process: it knows nothing of the last one."""
        self.generation += 1
        self._begin_session()

    def _begin_session(self) -> None:
        plan, rng = self.plan, self._rng
        self._training = Training(plan, rng, self, self._may_leave, self.reads)
        instance = f"{rng.getrandbits(128):032x}"
        terms = JoinTerms(plan.name, plan.config(), False, plan.rank, instance)
        journal = Journal(_REPLAY_BYTES if plan.replay else 0)
        self.core = SessionCore(terms, journal, lambda size, _: _Memory(size, self), self._heap.now, TIMEOUT_S)
        self._link: _Link | None = None
        self._script: Script | None = None
        self._aside: Call | None = None  # nobody waits for it
        self._cancelled: set[Call] = set()
        self._tick_at: float | None = None
        self._tick()

    def kill(self) -> None:
        link, self._link = self._link, None
        self.generation += 1
        self.restarts += 1
        if link is not None:
            link.connection.close(0, "the trainer died")

    def later(self, action: Callable[..., None], *arguments: object) -> None:
        """An event of this process: not while it is paused, and not after its death."""
        generation = self.generation

        def run() -> None:
            if generation != self.generation or self.is_done:
                return
            if self._heap.now < self.paused_until:
                self._heap.at(self.paused_until, run)
            else:
                action(*arguments)

        run()

    def after(self, delay: float, action: Callable[..., None], *arguments: object) -> None:
        generation = self.generation
        self._heap.after(delay, lambda: self.later(action, *arguments) if generation == self.generation else None)

    def carry_out(self) -> None:
        generation = self.generation
        while generation == self.generation and (actions := self.core.take_actions()):
            waiting: list[Outbound] = []
            for action in actions:
                if isinstance(action, Send):
                    waiting.append((action.header, action.payload))
                    continue
                if isinstance(action, Settled):
                    self._flush(waiting)
                waiting = []  # what was meant for a connection that is given up is not sent
                self._act(action)
                if generation != self.generation:
                    return
            self._flush(waiting)
        if generation == self.generation and not self.is_done and not self._has_begun_or_ended():
            self._set_timer()

    def _act(self, action: object) -> None:
        match action:
            case Connect():
                self._open()
            case Disconnect():
                self._drop_link()
            case Settled():
                self.results = action.results
                self._resume(action.call, action.error)

    def _has_begun_or_ended(self) -> bool:
        """Begins the training once the run is joined; True where something else is to happen than waiting."""
        failure, joined = self.core.failure, self.core.joined
        if self._script is not None or (failure is None and joined is None):
            return False
        if failure is None and joined is not None:
            self._script = self._training.script(int(joined.step))
            self._advance(None)
            self.carry_out()
        elif isinstance(failure, AlreadyExists) and joined is None:
            # The server has not heard yet that this trainer's predecessor is dead; a user starts it again.
            self.generation += 1
            self.after(10.0, self._begin_session)
        else:
            self.failure = f"{type(failure).__name__}: {failure}"
            self.is_done = True
        return True

    def _flush(self, frames: list[Outbound]) -> None:
        if frames and self._link is not None:
            shared = self._link.connection.shared
            for message in self._link.encoder.messages(frames if shared is None else shared.placed(frames)):
                self._link.connection.send(0, message)

    def _open(self) -> None:
        self._drop_link()
        connection = self._connect(self)
        if connection is None:
            self.after(0.001, self._refused, self.core)
            return
        link = _Link(self, connection)
        connection._ends = (link, connection._ends[1])
        self._link = link

    def _refused(self, core: SessionCore) -> None:
        if core is self.core:
            self.core.disconnected(ServerUnavailable("connection refused"), self._heap.now)
            self.carry_out()

    def _drop_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.decoder.close()
            link.connection.close(0, "closed by the trainer")

    def ended(self, link: _Link, reason: str) -> None:
        if link is not self._link:
            return
        self._link = None
        link.decoder.close()
        self.core.disconnected(_error_of(reason), self._heap.now)
        self.carry_out()

    def _tick(self) -> None:
        self._tick_at = None
        self.core.tick(self._heap.now)
        self.carry_out()

    def _set_timer(self) -> None:
        deadline = self.core.next_deadline()
        if deadline is None or (self._tick_at is not None and self._heap.now <= self._tick_at <= deadline):
            return
        self._tick_at = deadline
        self.after(max(0.0, deadline - self._heap.now), self._tick)

    # The training

    def _resume(self, call: Call, error: KtExpertError | None) -> None:
        if isinstance(error, RunStateLost):
            self._lost()
        elif self.core.failure is not None and error is not None:
            self.failure = f"{type(error).__name__}: {error}"
            self.is_done = True
        elif call is self._aside:
            assert error is None, f"a forward nobody waited for failed: {error}"
            self._aside = None
        else:
            self._advance((call, error))

    def _lost(self) -> None:
        """What a user does: open the run again, go on from the step the server has."""
        self.losses += 1
        self._script = None
        self.generation += 1
        self._begin_session()

    def _advance(self, outcome: tuple[Call, KtExpertError | None] | None) -> None:
        assert self._script is not None
        try:
            call = next(self._script) if outcome is None else self._script.send(outcome)
        except StopIteration:
            self.is_done = True
            self._drop_link()
            return
        if call.timeout_s < 0:  # a pause of the training loop's own
            self.after(-call.timeout_s, self._go_on, call)
            return
        assert self.core.has_room(call.size_bytes)
        try:
            self.core.submit(call, self._heap.now)
        except RunStateLost:
            self._lost()
            return
        if call.op in (Op.FORWARD, Op.BACKWARD) and self._rng.random() < self.plan.cancels:
            self.after(0.005 * self._rng.random(), self._cancel, call)

    def _go_on(self, call: Call) -> None:
        if isinstance(self.core.failure, RunStateLost):
            self._lost()
            return
        self._advance((call, None))
        self.carry_out()

    def _cancel(self, call: Call) -> None:
        if call in self.core._in_flight:
            self._cancelled.add(call)
            self.core.cancel(call)
            self.carry_out()

    # What a training may do beside its calls

    def cancel_later(self, call: Call, most_s: float) -> None:
        self.after(most_s * self._rng.random(), self._cancel, call)

    def was_cancelled(self, call: Call) -> bool:
        """By this trainer, whose calls nobody else may end."""
        return call in self._cancelled

    def release_later(self, ticket: int, delay_s: float) -> None:
        self.after(delay_s, self._release, ticket)

    def _release(self, ticket: int) -> None:
        self.core.release(ticket)
        self.carry_out()

    def ask_aside(self, call: Call) -> None:
        """A forward of the state before a step, whose outcome the step does not wait for."""
        if self._aside is None and self.core.has_room(2 * call.size_bytes):
            self._aside = call
            self.went_ahead += 1
            self.core.submit(call, self._heap.now)


class _Link:
    """The trainer's end of a connection, as the product's transport is."""

    def __init__(self, process: TrainerProcess, connection: Connection) -> None:
        self._process, self.connection = process, connection
        self.encoder = Encoder(piece_bytes=process.plan.piece_bytes)
        self.decoder: Decoder[Buffer] = Decoder(self, None if connection.shared is None else self)
        self._bites = None if connection.bites_rng is None else Bites(self.decoder, connection.bites_rng)

    def admit(self, header: Header) -> Buffer | None:
        return self._process.core.admit(header)

    def show(self, header: Header, place: Place) -> Buffer | None:
        assert self.connection.shared is not None  # a decoder of the network refuses places by itself
        return self._process.core.admit(header, self.connection.shared.trainer.show(header, place))

    def freed(self, place: Place) -> None:
        assert self.connection.shared is not None
        self.connection.shared.trainer.freed(place)

    def ended(self, payload: bytes) -> None:
        raise AssertionError(f"a simulated connection ends by itself and not by a frame: {payload!r}")

    def deliver(self, header: Header, payload: bytes | Buffer) -> None:
        self._process.core.received(header, payload, self._process._heap.now)

    def on_message(self, message: bytes) -> None:
        self._process.later(self._message, message)

    def _message(self, message: bytes) -> None:
        if self is not self._process._link:
            return
        try:
            (self._bites or self.decoder).feed(message)
        except FrameError as error:
            if self.connection.shared is not None:
                raise AssertionError(f"a frame made no sense on one host: {error}") from error
            self._process._drop_link()
            self._process.core.disconnected(ServerFault(f"malformed frame: {error}"), self._process._heap.now)
        self._process.carry_out()

    def on_end(self, reason: str) -> None:
        self._process.later(self._process.ended, self, reason)


def _error_of(reason: str) -> KtExpertError:
    code, _, rest = reason.partition("|")
    if code not in STATUS_NUMBERS:
        return ServerUnavailable(reason)
    delay, _, text = rest.partition("|")
    return from_status(STATUS_NUMBERS[code], text, float(delay))
