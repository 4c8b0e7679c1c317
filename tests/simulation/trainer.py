"""A simulated trainer process: the product's session core, and a training loop that is a generator of calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
from kt_expert_client.errors import (
    AlreadyExists,
    BarrierBroken,
    Cancelled,
    KtExpertError,
    RunStateLost,
    ServerFault,
    ServerUnavailable,
    from_status,
)
from kt_expert_client.session.actions import Connect, Disconnect, JoinTerms, Send, Settled
from kt_expert_client.session.calls import Call, OutTensor
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.journal import Journal
from kt_expert_proto.codec import Buffer, Decoder, Encoder, Outbound
from kt_expert_proto.dtypes import ITEM_BYTES, Dtype
from kt_expert_proto.header import MAX_PAYLOAD_BYTES, FrameError, Header, Op, Tensor
from kt_expert_proto.lora import LayerLora
from kt_expert_proto.status import STATUS_NUMBERS
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb

from simulation.heap import EventHeap
from simulation.model import HIDDEN, LAYERS, TOKENS, TOP_K, batch
from simulation.network import Connection

TIMEOUT_S = 100_000.0  # of every call: a schedule's outages are shorter
_MAX_NORM = 0.3
_RETRY_S = 0.5
_LINGER_S = 20.0
_REPLAY_BYTES = 1 << 24
Results = dict[Tensor, np.ndarray]
Script = Generator[Call, "tuple[Call, KtExpertError | None]", None]


@dataclass(frozen=True)
class Plan:
    """What a trainer does, whatever befalls it."""

    run: int
    rank: int
    world_size: int
    steps: int
    micro_batches: int
    replay: bool
    cancels: float = 0.0  # chance to cancel a pass
    extras: float = 0.0  # chance of what leaves no trace: a forward whose ticket is released, a new window that is cancelled
    piece_bytes: int = MAX_PAYLOAD_BYTES

    @property
    def name(self) -> str:
        return f"run-{self.run}"

    def config(self) -> pb.RunConfig:
        lora = [LayerLora(layer, layer % 2 == 0, 2, 2, 2, 1.0, 1.0, 0.5).to_proto() for layer in range(LAYERS)]
        return pb.RunConfig(world_size=self.world_size, wire_dtype=pb.WIRE_DTYPE_FP32, lora=lora, seed=self.run)


class _Memory:
    """Implements Buffer."""

    def __init__(self, size: int, counter: TrainerProcess) -> None:
        self.view = memoryview(bytearray(size))
        self._counter = counter
        counter.buffers += 1

    def release(self) -> None:
        self._counter.buffers -= 1


class _Source:
    """A tensor of a request. Implements Source; it is not to be read once the session has let go of it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        self.is_released = False

    def view(self) -> memoryview:
        assert not self.is_released, "a tensor is read after the session has let go of it"
        return self._values.data.cast("B")


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
        self.has_trained = False  # all steps; it leaves when all ranks of its run have
        self.losses = 0  # times the server lost what this trainer had done
        self.restarts = 0
        self.was_paused_long = False
        self.went_ahead = 0  # steps asked for before the outcome of a forward was there
        self.failure: str = ""
        self.buffers = 0
        self._results: dict[Tensor, Buffer] = {}  # of the latest outcome
        self.start()

    def start(self) -> None:
        """A new process: it knows nothing of the last one."""
        self.generation += 1
        self._begin_session()

    def _begin_session(self) -> None:
        self.has_trained = False
        plan, rng = self.plan, self._rng
        instance = f"{rng.getrandbits(128):032x}"
        terms = JoinTerms(plan.name, plan.config(), False, plan.rank, instance)
        journal = Journal(_REPLAY_BYTES if plan.replay else 0)
        self.core = SessionCore(terms, journal, lambda size, _: _Memory(size, self), self._heap.now, TIMEOUT_S)
        self._link: _Link | None = None
        self._script: Script | None = None
        self._aside: Call | None = None  # nobody waits for it
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
                self._results = action.results
                self._resume(action.call, action.error)

    def _has_begun_or_ended(self) -> bool:
        """Begins the training once the run is joined; True where something else is to happen than waiting."""
        failure, joined = self.core.failure, self.core.joined
        if self._script is not None or (failure is None and joined is None):
            return False
        if failure is None and joined is not None:
            self._script = self._train(int(joined.step))
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
            for message in self._link.encoder.messages(frames):
                self._link.connection.send(0, message)

    def _open(self) -> None:
        self._drop_link()
        link = _Link(self)
        connection = self._connect(self)
        if connection is None:
            self.after(0.001, self._refused, self.core)
            return
        link.connection = connection
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
            self.core.cancel(call)
            self.carry_out()

    def _train(self, step: int) -> Script:
        plan = self.plan
        while step < plan.steps:
            accumulated = False
            while not accumulated:
                for micro in range(plan.micro_batches):
                    yield from self._micro_batch(step, micro)
                accumulated = self._rng.random() >= plan.extras or (yield from self._cancelled_window(step))
            while True:
                norm = yield from self._ask(Call(Op.GRAD_NORM, spb.RequestOpen(grad_norm=spb.GradNorm()), TIMEOUT_S))
                if norm is None:
                    continue
                scale = min(1.0, _MAX_NORM / (norm.norm + 1e-6))
                update = pb.ParamGroup(adamw=pb.Adam(learning_rate=0.02, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.01))
                if self._rng.random() < 3 * plan.extras:
                    self._evaluate_aside(step)
                opened = spb.RequestOpen(step=spb.Step(step=step + 1, grad_scale=scale, groups=[update]))
                stepped = yield from self._ask(Call(Op.STEP, opened, TIMEOUT_S))
                if stepped is not None:
                    break
            assert stepped.step == step + 1, f"step {step + 1} was asked for, the run is at {stepped.step}"
            step = int(stepped.step)
        self.has_trained = True
        while not self._may_leave():  # somebody may yet have to repeat steps that need this rank
            yield Call(Op.NONE, spb.RequestOpen(), -_LINGER_S)
        yield from self._ask(Call(Op.LEAVE, spb.RequestOpen(leave=spb.Leave()), TIMEOUT_S))

    def _ask(self, call: Call) -> Generator[Call, tuple[Call, KtExpertError | None], spb.ResultHead | None]:
        """None where a barrier broke and the same is to be asked again."""
        call, error = yield call
        if isinstance(error, BarrierBroken):
            yield Call(Op.NONE, spb.RequestOpen(), -_RETRY_S)
            return None
        if error is not None:
            raise AssertionError(f"{call.op.name} failed: {type(error).__name__}: {error}")
        assert call.head is not None
        return call.head

    def _micro_batch(self, step: int, micro: int) -> Generator[Call, tuple[Call, KtExpertError | None], None]:
        plan = self.plan
        x, ids, weights = batch(plan.run, plan.rank, step, micro)
        tickets = []
        for layer in range(LAYERS):
            if self._rng.random() < plan.extras:
                yield from self._extra(layer, x, ids, weights)
            call = yield from self._pass(lambda layer=layer, x=x: _forward(layer, x, ids, weights))
            x = x + self._array(Tensor.OUTPUT)
            tickets.append(call.request_id)
        dy = np.cos(x)
        for layer in reversed(range(LAYERS)):
            begins = micro == 0 and layer == LAYERS - 1
            ticket = tickets[layer]
            call = yield from self._pass(
                lambda layer=layer, dy=dy, ticket=ticket, begins=begins: _backward(layer, ticket, dy, begins)
            )
            dy = dy + self._array(Tensor.GRAD_HIDDEN_STATES)

    def _pass(self, make: Callable[[], Call]) -> Generator[Call, tuple[Call, KtExpertError | None], Call]:
        """Asked for again where it was cancelled."""
        while True:
            call, error = yield make()
            if error is None:
                return call
            assert isinstance(error, Cancelled), f"{call.op.name} failed: {type(error).__name__}: {error}"

    def _cancelled_window(self, step: int) -> Generator[Call, tuple[Call, KtExpertError | None], bool]:
        """Begins a new window and cancels that. True where it was cancelled in time: the old window then still counts."""
        x, ids, weights = batch(self.plan.run, self.plan.rank, step, 0)
        forward = yield from self._pass(lambda: _forward(0, x, ids, weights))
        backward = _backward(0, forward.request_id, x, True)
        self.after(0.004 * self._rng.random(), self._cancel, backward)
        _, error = yield backward
        assert error is None or isinstance(error, Cancelled), error
        if error is not None:
            self.core.release(forward.request_id)
            self.carry_out_later()
        return error is not None

    def _extra(
        self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray
    ) -> Generator[Call, tuple[Call, KtExpertError | None], None]:
        """What an evaluation does in between: a forward whose ticket nobody uses."""
        call = yield from self._pass(lambda: _forward(layer, x, ids, weights))
        # A finalizer runs when it likes: while the forward is being repeated, too.
        self.after(self._rng.choice((0.0, 0.5, 30.0)), self._release, call.request_id)

    def _release(self, ticket: int) -> None:
        self.core.release(ticket)
        self.carry_out()

    def _evaluate_aside(self, step: int) -> None:
        """A forward of the state before the step, whose outcome the step does not wait for."""
        call = _forward(0, *batch(self.plan.run, self.plan.rank, step, 0), keeps=False)
        if self._aside is None and self.core.has_room(2 * call.size_bytes):
            self._aside = call
            self.went_ahead += 1
            self.core.submit(call, self._heap.now)

    def _array(self, tensor: Tensor) -> np.ndarray:
        return np.frombuffer(self._results[tensor].view, np.float32).reshape(-1, HIDDEN)

    def carry_out_later(self) -> None:
        self.after(0.0, self.carry_out)


class _Link:
    """The trainer's end of a connection, as the product's transport is."""

    def __init__(self, process: TrainerProcess) -> None:
        self._process = process
        self.encoder = Encoder(piece_bytes=process.plan.piece_bytes)
        self.decoder: Decoder[Buffer] = Decoder(self)
        self.connection: Connection

    def admit(self, header: Header) -> Buffer | None:
        return self._process.core.admit(header)

    def deliver(self, header: Header, payload: bytes | Buffer) -> None:
        self._process.core.received(header, payload, self._process._heap.now)

    def on_message(self, message: bytes) -> None:
        self._process.later(self._message, message)

    def _message(self, message: bytes) -> None:
        if self is not self._process._link:
            return
        try:
            self.decoder.feed(message)
        except FrameError as error:
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


def _out(tensor: Tensor, dtype: Dtype, values: np.ndarray) -> OutTensor:
    return OutTensor(tensor, dtype, values.shape[0], values.shape[1], _Source(values))


def _forward(layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, keeps: bool = True) -> Call:
    sent = (
        _out(Tensor.EXPERT_IDS, Dtype.INT32, ids),
        _out(Tensor.ROUTING_WEIGHTS, Dtype.FP32, weights),
        _out(Tensor.HIDDEN_STATES, Dtype.FP32, x),
    )
    opened = spb.RequestOpen(forward=spb.Forward(top_k=TOP_K, save_for_backward=keeps, use_adapter=True))
    expects = {Tensor.OUTPUT: x.nbytes}
    return Call(Op.FORWARD, opened, TIMEOUT_S, layer, Dtype.FP32, TOKENS, HIDDEN, sent, expects, on_unneeded=_let_go)


def _backward(layer: int, ticket: int, dy: np.ndarray, begins: bool) -> Call:
    opened = spb.RequestOpen(backward=spb.Backward(ticket=ticket, begin_window=begins))
    expects = {
        Tensor.GRAD_HIDDEN_STATES: dy.nbytes,
        Tensor.GRAD_ROUTING_WEIGHTS: TOKENS * TOP_K * ITEM_BYTES[Dtype.FP32],
    }
    sent = (_out(Tensor.GRAD_OUTPUT, Dtype.FP32, dy),)
    return Call(Op.BACKWARD, opened, TIMEOUT_S, layer, Dtype.FP32, TOKENS, HIDDEN, sent, expects, on_unneeded=_let_go)


def _let_go(call: Call) -> None:
    for each in call.tensors:
        assert isinstance(each.source, _Source)
        each.source.is_released = True
