"""The server's half of the protocol as one state machine: events and the time go in, actions come out.

It does no I/O, starts no threads, reads no clock and draws no random numbers. The driver (edge/driver.py, or a simulator) calls
one method at a time and then carries out take_actions(), in order.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from kt_expert_proto.header import FrameError, FrameType, Header
from kt_expert_proto.v1.session_pb2 import Join, Joined

from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.engine.buffers import PooledBuffer, TensorMemory
from kt_expert_server.engine.fast_path import FastForwards
from kt_expert_server.engine.passes import Tools
from kt_expert_server.errors import InvalidRequest, OutOfCapacity, ServerError, ServerUnavailable
from kt_expert_server.members import wire
from kt_expert_server.members.actions import Action, EndStream, Send
from kt_expert_server.members.dispatch import Dispatch
from kt_expert_server.members.exchange import Exchange
from kt_expert_server.members.limits import Limits
from kt_expert_server.members.replay_log import Phase
from kt_expert_server.members.requests import Requests
from kt_expert_server.members.run import Member, Run
from kt_expert_server.members.runs import Runs, Wanted
from kt_expert_server.members.saving import Saving
from kt_expert_server.members.stopping import Stopping
from kt_expert_server.model.loader import BaseModel

_LOADING_RETRY_S = 1.0
_SILENCE_RETRY_S = 0.1
_CROWDED_RETRY_S = 5.0


def _no_join(join_s: float) -> ServerUnavailable:
    return ServerUnavailable(f"no JOIN came within {join_s:g} s; open another stream", retry_delay_s=_SILENCE_RETRY_S)


class State(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(eq=False, slots=True)
class _Stream:
    """A connection that has joined (exchange is set), is waiting for its run (is_joining), or has said nothing yet."""

    identity: str
    opened_at: float
    memory: TensorMemory | None  # that both ends see
    fast: FastForwards | None
    is_joining: bool = False
    exchange: Exchange | None = None


class ServerCore:
    """All runs, members and streams of one server."""

    def __init__(self, tools: Tools, limits: Limits, store: CheckpointStore | None) -> None:
        self.limits = limits
        self.model: BaseModel | None = None
        self.dispatch = Dispatch(tools.observer, tools.engine)
        self._tools = tools
        self._saving = Saving(self.dispatch, tools.budget, store, limits, tools.observer, self._model_digest)
        self.runs = Runs(self.dispatch, tools.budget, limits, tools.engine, self._saving)
        self.requests = Requests(tools, self.dispatch, self._saving)
        self.runs.requests = self.requests
        self._saving.reserve = self.runs.reclaim.reserve
        self.dispatch.after_failure = self._advance_all
        self.dispatch.before_change = self._revoke
        self.dispatch.reclaim, self.dispatch.explain = self.runs.reclaim.for_job, self.runs.reclaim.with_retry
        self._stopping: Stopping | None = None
        self._streams: dict[int, _Stream] = {}

    # Events

    def become_ready(self, model: BaseModel) -> None:
        self.model = model

    def stream_opened(
        self, stream: int, identity: str, now: float, memory: TensorMemory | None = None, fast: FastForwards | None = None
    ) -> None:  # fmt: skip
        """`memory`: which the trainer sees as well. `fast`: through which it may ask for small forwards past this core. Raises
        OutOfCapacity where there are too many."""
        if len(self._streams) >= self.limits.max_streams:
            raise OutOfCapacity(
                f"{len(self._streams)} streams are open, the limit is {self.limits.max_streams}; try again later",
                retry_delay_s=_CROWDED_RETRY_S,
            )
        self._streams[stream] = _Stream(identity, now, memory, fast)

    def stream_closed(self, stream: int, now: float) -> None:
        """By the peer or the network. Accepted requests go on, half-received ones are dropped."""
        self.dispatch.now = now
        state = self._streams.pop(stream, None)
        if state is None or state.exchange is None:
            return
        state.exchange.close()
        member = state.exchange.member
        if member.stream == stream:
            member.detach()
            member.lease.detach(now)
            member.lapse_was_told = False
            if member.is_leaving:
                self.runs.remove(member)

    def admit(
        self, stream: int, header: Header, now: float, offered: PooledBuffer | None = None
    ) -> PooledBuffer | None:  # fmt: skip
        """See FrameReceiver. `offered` holds the tensor already, in memory that its trainer may still write; where another
        buffer is returned, it is to be copied. Raises FrameError; the stream must then be ended with fail()."""
        self.dispatch.now = now
        state = self._streams.get(stream)
        if state is None:
            return None
        if state.exchange is None:
            raise FrameError(f"tensor {header.tensor.name} came before JOIN")
        return state.exchange.admit(header, offered)

    def received(self, stream: int, header: Header, payload: bytes | PooledBuffer, now: float) -> None:
        """A whole frame. Raises FrameError; the stream must then be ended with fail()."""
        self.dispatch.now = now
        state = self._streams.get(stream)
        if state is None:
            if not isinstance(payload, bytes):
                payload.release()
            return
        if state.exchange is not None and isinstance(payload, bytes):
            state.exchange.frame(header, payload)
        elif state.exchange is not None and not isinstance(payload, bytes):
            state.exchange.tensor(header, payload)
        elif header.type is FrameType.JOIN and not state.is_joining and isinstance(payload, bytes):
            self._join(stream, state, header, payload)
        else:
            raise FrameError(f"{header.type.name} came before the stream had joined")

    def fail(self, stream: int, error: ServerError, now: float) -> None:
        """Ends a stream whose frames make no sense."""
        if stream in self._streams:
            self.stream_closed(stream, now)
            self.dispatch.emit(EndStream(stream, error))

    def work_done(self, error: Exception | None, now: float, fault: str = "") -> None:
        """The piece of work of the last StartWork has ended."""
        self.dispatch.now = now
        self.dispatch.work_done(error, fault)
        self._advance_all()

    def disk_done(self, job_id: int, result: object, error: Exception | None, now: float, fault: str = "") -> None:
        self.dispatch.now = now
        self.dispatch.disk_done(job_id, result, error, fault)
        self._advance_all()

    def tick(self, now: float) -> None:
        """Time has passed: at least as often as next_deadline() says."""
        self.dispatch.now = now
        for stream, state in list(self._streams.items()):
            if state.exchange is not None:
                state.exchange.expire(now)
            elif not state.is_joining and now >= state.opened_at + self.limits.join_s:
                self.fail(stream, _no_join(self.limits.join_s), now)
        self.runs.tick()
        self._advance_all()

    def close_run(self, name: str, identity: str, now: float) -> None:
        """Raises NotFound or NotPermitted."""
        self.dispatch.now = now
        self.runs.close(self.runs.named(name, identity))

    def drain(self) -> None:
        """No new runs and members; those that are there go on."""
        self.runs.is_draining = True

    def stop(self, now: float, timeout_s: float) -> None:
        """Drains, and takes no new requests either: they are left to the next server. What was accepted has that long.
        has_stopped tells when everything is done."""
        self.dispatch.now = now
        self.drain()
        self.runs.is_stopping = True
        self._stopping = Stopping(self, now, timeout_s)
        for state in self._streams.values():
            if state.exchange is not None:
                state.exchange.is_stopping = True

    def cancel_all(self) -> None:
        """What still runs is to end soon."""
        for member in self.runs.members:
            for entry in list(member.log):
                self.requests.cancel(member, entry)
        self._advance_all()

    def checkpoint_all(self) -> None:
        """A last automatic checkpoint of every run that changed since its last one."""
        for run in self.runs.by_name.values():
            if run.changed_since_snapshot and run.step and not run.ephemeral:
                self._saving.take(run)

    def end_all(self, error: ServerError) -> None:
        """A last word to every member."""
        for stream in list(self._streams):
            self.fail(stream, error, self.dispatch.now)

    def report_fast(self) -> None:
        """Tells the observer of forwards that passed this core by."""
        for member in self.runs.members:
            if member.fast is not None:
                member.fast.report(self._tools.observer)

    def _revoke(self, name: str) -> None:
        """What forwards of that run compute with is about to change."""
        run = self.runs.by_name.get(name)
        for member in () if run is None else run.members.values():
            if member.fast is not None:
                member.fast.revoke()

    def warn(self, text: str, level: int) -> None:
        self.dispatch.note(text, level)

    # What comes out

    def take_actions(self) -> list[Action]:
        """Everything decided since the last call."""
        actions = self.dispatch.take_actions()
        if self._stopping is not None and not actions:
            self._stopping.advance(self.dispatch.now)
            actions = self.dispatch.take_actions()
        for action in actions:
            state = self._streams.pop(action.stream, None) if isinstance(action, EndStream) else None
            if state is not None and state.exchange is not None:
                state.exchange.close()
        return actions

    def next_deadline(self) -> float | None:
        """When tick() is due, if nothing else happens."""
        times = [
            self.runs.next_deadline(),
            self.dispatch.next_deadline(),
            None if self._stopping is None else self._stopping.next_deadline(),
        ]
        for state in self._streams.values():
            if state.exchange is not None:
                times.append(state.exchange.next_deadline())
            elif not state.is_joining:
                times.append(state.opened_at + self.limits.join_s)
        return min((each for each in times if each is not None), default=None)

    @property
    def state(self) -> State:
        if self.runs.is_draining:
            return State.DRAINING
        return State.READY if self.model is not None else State.LOADING

    @property
    def has_stopped(self) -> bool:
        return self._stopping is not None and self._stopping.is_over

    @property
    def is_idle(self) -> bool:
        """No accepted request lacks its outcome, and nothing is being written. A server that stops waits for nobody at a
        barrier: no other member's request is accepted any more that could complete it."""
        heads = [member.log.head() for member in self.runs.members]
        return self.dispatch.is_idle and all(
            head is None or (self._stopping is not None and head.phase is Phase.AT_BARRIER) for head in heads
        )

    @property
    def has_unacknowledged(self) -> bool:
        """Some connected trainer has not acknowledged all its outcomes."""
        connected = [member for member in self.runs.members if member.stream is not None]
        return any(entry.outcome is not None for member in connected for entry in member.log)

    def loaded_model(self) -> BaseModel:
        """Raises ServerUnavailable while it loads."""
        if self.model is None:
            raise ServerUnavailable(
                "the model is still loading; try again when /readyz answers 200", retry_delay_s=_LOADING_RETRY_S
            )
        return self.model

    # Joining

    def _model_digest(self) -> str:
        return self.loaded_model().plan.digest

    def _join(self, stream: int, state: _Stream, header: Header, payload: bytes) -> None:
        try:
            join = Join.FromString(payload)
        except DecodeError as error:
            raise FrameError(f"JOIN does not hold a Join: {error}") from None
        state.is_joining, now = True, self.dispatch.now
        try:
            model = self.loaded_model()
            wanted = Wanted(
                join.run, wire.run_config(join.config), join.ephemeral, join.rank, wire.check_instance(join.instance),
                header.epoch,
                join.born, join.takeover, state.identity,
            )  # fmt: skip
        except ServerError as error:
            self.fail(stream, error, now)
            return
        if join.resume_only:
            self._resume_only(stream, wanted, join, model)
            return
        self.runs.open(wanted, model, self._when_open(stream, wanted, join, model))

    def _resume_only(self, stream: int, wanted: Wanted, join: Join, model: BaseModel) -> None:
        """For a trainer that only wants to leave: what is not there is not made for its sake."""
        run = self.runs.by_name.get(wanted.run)
        member = None if run is None or run.owner != wanted.identity else run.members.get(wanted.rank)
        if run is None or member is None or member.instance != wanted.instance:
            self.fail(stream, wire.not_joined(wanted.run), self.dispatch.now)
        else:
            self._when_open(stream, wanted, join, model)(run)

    def _when_open(self, stream: int, wanted: Wanted, join: Join, model: BaseModel) -> Callable[[Run | ServerError], None]:
        def done(result: Run | ServerError) -> None:
            state = self._streams.get(stream)
            if state is None:
                return  # it went meanwhile; the run stays for whoever comes
            try:
                if isinstance(result, ServerError):
                    raise result
                member, resumed = self.runs.take_rank(result, wanted)
            except ServerError as error:
                self.fail(stream, error, self.dispatch.now)
                return
            self._attach(stream, state, member, wanted.epoch, model)
            try:
                self._answer_join(state, member, join, resumed=resumed)
            except FrameError as error:  # it may be called for a stream whose JOIN came long ago
                self.fail(stream, InvalidRequest(f"malformed JOIN: {error}"), self.dispatch.now)

        return done

    def _attach(self, stream: int, state: _Stream, member: Member, epoch: int, model: BaseModel) -> None:
        """This is the member's stream from now on; an older one is fenced."""
        assert epoch >= member.epoch, f"{member} was joined under epoch {epoch} after {member.epoch}"  # noqa: S101
        older, member.epoch = member.stream, epoch
        if older is not None:
            self._streams.pop(older).exchange.close()  # type: ignore[union-attr]  # a member's stream has joined
            self.dispatch.emit(EndStream(older, wire.replaced(member.rank, epoch)))
        member.detach()
        member.stream, member.memory, member.fast = stream, state.memory, state.fast
        member.lease.attach()
        tools = self._tools
        state.exchange = Exchange(
            stream,
            member,
            model,
            self.limits,
            self.runs,
            self.requests,
            tools.pool,
            tools.observer,
            lambda: self.dispatch.now,
        )
        state.exchange.is_stopping = self._stopping is not None

    def _answer_join(self, state: _Stream, member: Member, join: Join, *, resumed: bool) -> None:
        run, limits, exchange = member.run, self.limits, state.exchange
        assert exchange is not None  # noqa: S101
        answer = Joined(
            credit_requests=limits.credit_requests,
            credit_bytes=limits.credit_bytes,
            lease_s=limits.lease_s,
            resumed=resumed,
            received=member.log.received if resumed else 0,
            included=0 if resumed else member.included,
            step=run.step,
            created=run.opened_by == member.instance,
            durable=member.durable,
            born=member.born,
        )
        header = Header(FrameType.JOINED, epoch=member.epoch)
        self.dispatch.emit(Send(exchange.stream, header, answer.SerializeToString()))
        if resumed:
            exchange.resume(join.acknowledged, list(join.tickets))

    def _advance_all(self) -> None:
        if self.model is None:
            return
        for member in self.runs.members:
            self.requests.advance(member, self.model)
