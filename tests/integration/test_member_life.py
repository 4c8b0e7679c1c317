"""A member's life in any order of events: both cores, hand in hand, driven by Hypothesis, which shrinks what it finds.

The simulator plays longer and stranger schedules; this one gives the shortest that fails.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from kt_expert_client.errors import Cancelled, KtExpertError, ServerUnavailable, from_status
from kt_expert_client.session.actions import Connect, Disconnect, JoinTerms, Phase, Send, Settled
from kt_expert_client.session.calls import Call, OutTensor
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.journal import Journal
from kt_expert_proto.codec import Buffer, Memory
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import Header, Op, Tensor
from kt_expert_proto.status import STATUS_NUMBERS
from kt_expert_proto.v1 import session_pb2 as spb
from kt_expert_server.errors import ServerError
from kt_expert_server.members.limits import Limits
from simulation.model import HIDDEN, TOKENS, TOP_K, batch
from simulation.schedule import digest
from support.adapters import ACTIVE, adamw, targets
from support.core import LORA, CoreServer, run_config

TIMEOUT_S = 1e6
LIMITS = Limits(checkpoint_every_steps=1)
TERMS = JoinTerms("run", run_config(), False, 0, "a" * 32)


class Bytes:
    """Implements Buffer."""

    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(size))

    def release(self) -> None:
        pass


@dataclass
class Stream:
    number: int
    frames: list[tuple[Header, bytes]] = field(default_factory=list)
    ended: ServerError | None = None
    coming: deque[tuple[Header, bytes]] = field(default_factory=deque)


def out(tensor: Tensor, dtype: Dtype, values: np.ndarray) -> OutTensor:
    return OutTensor(tensor, dtype, *values.shape, Memory(np.ascontiguousarray(values).data.cast("B")))


def forward_of(seed: int) -> Call:
    x, ids, weights = batch(0, 0, seed, 0)
    sent = (
        out(Tensor.EXPERT_IDS, Dtype.INT32, ids),
        out(Tensor.ROUTING_WEIGHTS, Dtype.FP32, weights),
        out(Tensor.HIDDEN_STATES, Dtype.FP32, x),
    )
    opened = spb.RequestOpen(forward=spb.Forward(top_k=TOP_K, save_for_backward=True, adapters=ACTIVE))
    return Call(Op.FORWARD, opened, TIMEOUT_S, 0, Dtype.FP32, TOKENS, HIDDEN, sent, {Tensor.OUTPUT: x.nbytes})


def backward_of(seed: int, ticket: int, *, begin: bool) -> Call:
    dy = batch(0, 0, seed, 0)[0]
    opened = spb.RequestOpen(backward=spb.Backward(ticket=ticket, targets=targets(LORA[0], replaced=begin)))
    expects = {Tensor.GRAD_HIDDEN_STATES: dy.nbytes, Tensor.GRAD_ROUTING_WEIGHTS: TOKENS * TOP_K * 4}
    sent = (out(Tensor.GRAD_OUTPUT, Dtype.FP32, dy),)
    return Call(Op.BACKWARD, opened, TIMEOUT_S, 0, Dtype.FP32, TOKENS, HIDDEN, sent, expects)


def step_of(index: int) -> Call:
    update = adamw(0.05)
    return Call(Op.STEP, spb.RequestOpen(step=spb.Step(step=index, groups=[update])), TIMEOUT_S)


class Life(RuleBasedStateMachine):
    """One trainer that can repeat what a dying server loses. What has succeeded, in order, is the model of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.step = 0.0, 0
        self.seeds: dict[Call, int] = {}
        self.tickets: dict[int, int] = {}  # of the present adapter, not consumed -> seed
        self.done: list[Call] = []
        self.stream: Stream | None = None
        self.start_server(CoreServer(LIMITS))
        self.client = SessionCore(TERMS, Journal(1 << 24), lambda size, _: Bytes(size), 0.0, TIMEOUT_S)
        self.settle_everything()

    def start_server(self, server: CoreServer) -> None:
        self.server = server
        server.holds_engine = server.holds_disk = True

    # What may happen

    @precondition(lambda self: self.may_submit())
    @rule(seed=st.integers(0, 3))
    def forward(self, seed: int) -> None:
        self.submit(forward_of(seed), seed)

    @precondition(lambda self: self.may_submit() and self.free_tickets())
    @rule(data=st.data(), begin=st.booleans())
    def backward(self, data: st.DataObject, begin: bool) -> None:
        ticket = data.draw(st.sampled_from(self.free_tickets()))
        self.submit(backward_of(self.tickets[ticket], ticket, begin=begin), self.tickets[ticket])

    @precondition(lambda self: self.may_submit() and self.is_quiet())
    @rule()
    def take_step(self) -> None:
        self.submit(step_of(self.step + 1), 0)

    @precondition(lambda self: self.may_submit())
    @rule()
    def zero_grad(self) -> None:
        self.submit(Call(Op.ZERO_GRAD, spb.RequestOpen(zero_grad=spb.ZeroGrad()), TIMEOUT_S), 0)

    @precondition(lambda self: self.free_tickets())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.free_tickets()))
        del self.tickets[ticket]
        self.client.release(ticket)
        self.act()

    @precondition(lambda self: self.passes())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.client.cancel(data.draw(st.sampled_from(self.passes())))
        self.act()

    @rule(frames=st.integers(1, 6))
    def something_reaches_the_server(self, frames: int) -> None:
        for _ in range(frames):
            self.feed_server()
        self.server.work_once()

    @rule(frames=st.integers(1, 6))
    def something_reaches_the_trainer(self, frames: int) -> None:
        for _ in range(frames):
            self.feed_client()
        self.server.write_once()

    @rule(moves=st.integers(1, 40))
    def all_goes_well_for_a_while(self, moves: int) -> None:
        for _ in range(moves):
            self.move()

    @rule(seed=st.integers(0, 3), steps=st.booleans(), cuts=st.integers(0, 60))
    def a_micro_batch(self, seed: int, steps: bool, cuts: int) -> None:
        """Forward, backward and perhaps a step, with the connection cut after so many moves."""
        self.settle_everything()
        forward = forward_of(seed)
        self.submit(forward, seed)
        self.settle_everything()
        calls = [backward_of(seed, forward.request_id, begin=False), *([step_of(self.step + 1)] if steps else [])]
        for call in calls:
            self.submit(call, seed)
            for _ in range(cuts):
                self.move()
            self.the_connection_is_cut()
            self.settle_everything()

    @precondition(lambda self: self.stream is not None)
    @rule()
    def the_connection_is_cut(self) -> None:
        self.cut()
        self.act()

    @precondition(lambda self: self.client.phase is Phase.JOINED)
    @rule()
    def the_server_dies(self) -> None:
        self.cut(server_lives=False)
        self.server.disk.crash()
        self.start_server(CoreServer(LIMITS, disk=self.server.disk))
        self.act()

    @rule(seconds=st.sampled_from([0.1, 5.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.server.tick(self.now)
        self.client.tick(self.now)
        self.act()

    @invariant()
    def nothing_is_out_of_order(self) -> None:
        assert self.client.failure is None, self.client.failure
        assert self.server.budget.is_sound
        for member in self.server.core.runs.members:
            ids = [entry.request_id for entry in member.log]
            assert ids == sorted(set(ids))

    def teardown(self) -> None:
        self.settle_everything()
        run = self.server.core.runs.by_name["run"]
        assert run.step == self.step
        assert digest(run.adapters, run.step) == undisturbed(self.done, self.seeds)

    # How it happens

    def may_submit(self) -> bool:
        return self.client.joined is not None and self.client.has_room(4096)

    def is_quiet(self) -> bool:
        return not self.client._in_flight.calls

    def passes(self) -> list[Call]:
        return [call for call in self.client._in_flight if call.op in (Op.FORWARD, Op.BACKWARD) and not call.is_replay]

    def free_tickets(self) -> list[int]:
        if any(call.op is Op.STEP for call in self.client._in_flight):
            return []  # it makes them stale
        taken = {call.ticket for call in self.client._in_flight}
        return [ticket for ticket in self.tickets if ticket not in taken]

    def submit(self, call: Call, seed: int) -> None:
        self.seeds[call] = seed
        self.client.submit(call, self.now)
        self.act()

    def act(self) -> None:
        """What the trainer's core has decided."""
        for action in self.client.take_actions():
            match action:
                case Connect():
                    self.drop()
                    self.stream = Stream(1 + max(self.server.members, default=0))
                    self.server.members[self.stream.number] = self.stream
                    self.server.core.stream_opened(self.stream.number, "", self.now)
                case Disconnect():
                    self.drop()
                case Send() if self.stream is not None:
                    content = action.payload if isinstance(action.payload, bytes) else bytes(action.payload.view())
                    self.stream.coming.append((action.header, content))
                case Settled():
                    self.settled(action.call, action.error)

    def settled(self, call: Call, error: KtExpertError | None) -> None:
        if error is not None:
            assert isinstance(error, Cancelled), error
            return
        self.done.append(call)
        if call.op is Op.FORWARD:
            self.tickets[call.request_id] = self.seeds[call]
        elif call.op is Op.BACKWARD:
            del self.tickets[call.ticket]
        elif call.op is Op.STEP:
            self.step += 1
            self.tickets.clear()

    def feed_server(self) -> bool:
        stream, core = self.stream, self.server.core
        if stream is None or not stream.coming:
            return False
        header, content = stream.coming.popleft()
        payload: bytes | Buffer | None = content
        if header.tensor is not Tensor.NONE:
            payload = core.admit(stream.number, header, self.now)
            if payload is not None:
                payload.view[:] = content
        if payload is not None:
            core.received(stream.number, header, payload, self.now)  # type: ignore[arg-type]
        self.server.carry_out()
        return True

    def feed_client(self) -> bool:
        stream = self.stream
        if stream is None:
            return False
        if stream.frames:
            header, content = stream.frames.pop(0)
            payload: bytes | Buffer = content
            if header.tensor is not Tensor.NONE:
                buffer = self.client.admit(header)
                assert buffer is not None
                buffer.view[:] = content
                payload = buffer
            self.client.received(header, payload, self.now)
        elif stream.ended is not None:
            error, self.stream = stream.ended, None
            told = from_status(STATUS_NUMBERS[error.code], str(error), error.retry_delay_s)
            self.client.disconnected(told, self.now)
        else:
            return False
        self.act()
        return True

    def drop(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            self.server.core.stream_closed(stream.number, self.now)
            self.server.carry_out()

    def cut(self, *, server_lives: bool = True) -> None:
        had, self.stream = self.stream, None if not server_lives else self.stream
        self.drop()
        if had is not None:
            self.client.disconnected(ServerUnavailable("cut"), self.now)

    def move(self) -> bool:
        """The next thing that happens where nothing goes wrong. False where that is nothing."""
        if self.feed_server() or self.feed_client() or self.server.work_once() or self.server.write_once():
            return True
        if self.client.phase is not Phase.APART:
            assert self.client.phase is Phase.JOINED, "a join is not answered"
            assert self.is_quiet(), "a call has no outcome"
            return False
        deadline = self.client.next_deadline()
        assert deadline is not None
        self.now = max(self.now, deadline)
        self.client.tick(self.now)
        self.act()
        return True

    def settle_everything(self) -> None:
        """Nothing goes wrong any more, until nothing is left to happen."""
        while self.move() or self.client.phase is not Phase.JOINED or not self.is_quiet():
            pass


def undisturbed(done: list[Call], seeds: dict[Call, int]) -> str:
    """The adapter after the same calls, one after another, on a server to which nothing happens."""
    other = Life.__new__(Life)
    RuleBasedStateMachine.__init__(other)
    other.now, other.step, other.seeds, other.tickets, other.done, other.stream = 0.0, 0, {}, {}, [], None
    other.start_server(CoreServer(LIMITS))
    other.client = SessionCore(TERMS, Journal(0), lambda size, _: Bytes(size), 0.0, TIMEOUT_S)
    other.settle_everything()
    renamed: dict[int, int] = {}
    for call in done:
        match call.op:
            case Op.FORWARD:
                again = forward_of(seeds[call])
            case Op.BACKWARD:
                again = backward_of(seeds[call], renamed[call.ticket], begin=bool(call.opened.backward.targets[0].replaced))
            case Op.STEP:
                again = step_of(call.opened.step.step)
            case _:
                again = Call(Op.ZERO_GRAD, spb.RequestOpen(zero_grad=spb.ZeroGrad()), TIMEOUT_S)
        other.submit(again, seeds[call])
        other.settle_everything()
        renamed[call.request_id] = again.request_id
    run = other.server.core.runs.by_name["run"]
    return digest(run.adapters, run.step)


TestMemberLife = Life.TestCase
TestMemberLife.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
