"""The training loop of a simulated trainer: a generator that yields calls and is sent their outcomes.

What it does by chance leaves no trace in the adapter. What leaves a trace stands in its plan, and so in the undisturbed
training that it is compared with.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from kt_expert_client.errors import AlreadyExists, BarrierBroken, Cancelled, KtExpertError, OutOfCapacity
from kt_expert_client.session.calls import Call
from kt_expert_proto.codec import Buffer
from kt_expert_proto.header import MAX_PAYLOAD_BYTES, Op, Tensor
from kt_expert_proto.lora import DEFAULT_ADAPTER
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from support.adapters import adamw

from simulation.calls import TIMEOUT_S, backward, forward, read_tensor, write_tensor
from simulation.model import COPIED, EXPERTS, HIDDEN, LAYERS, MADE_LATER, RANK, WEIGHTS, batch, lora_of

_MAX_NORM = 0.3
_RETRY_S = 0.5
_LINGER_S = 20.0
_DROPOUT = 0.25
_DISK_RETRY_S = 5.0
# When a plan edits: it saves before one step, writes tensors before a later one, counts that one as taken, and goes back.
_SAVED_AT, _WRITTEN_AT, _REWOUND_AT = 1, 2, 4
_MADE_AT, _COPIED_AT = 1, 3  # when a plan makes adapters
Outcome = tuple[Call, KtExpertError | None]
Script = Generator[Call, Outcome, None]


@dataclass(frozen=True)
class Plan:
    """What a trainer does, whatever befalls it."""

    run: int
    rank: int
    world_size: int
    steps: int
    micro_batches: int
    replay: bool
    drops: bool = False  # LoRA inputs are dropped
    edits: bool = False  # it writes tensors and the step count, saves checkpoints and goes back to one
    adapters: bool = False  # it makes, copies and deletes adapters, and trains them alone and together
    weights: bool = False  # it trains the layers' own weights beside LoRA
    cancels: float = 0.0  # chance to cancel a pass
    extras: float = 0.0  # chance of what leaves no trace, such as a new window that is cancelled
    piece_bytes: int = MAX_PAYLOAD_BYTES

    @property
    def name(self) -> str:
        return f"run-{self.run}"

    def active(self, step: int) -> tuple[str, ...]:
        """The adapters that a step trains."""
        if self.weights and step >= _MADE_AT:
            return (WEIGHTS, DEFAULT_ADAPTER) if step % 2 else (WEIGHTS,)
        if not self.adapters or step < _MADE_AT:
            return (DEFAULT_ADAPTER,)
        if step < _COPIED_AT:
            return (DEFAULT_ADAPTER, MADE_LATER) if step % 2 else (MADE_LATER,)
        return (COPIED, DEFAULT_ADAPTER) if step % 2 else (COPIED,)

    def config(self) -> pb.RunConfig:
        dropout = _DROPOUT if self.drops else 0.0
        lora = [lora_of(layer, dropout).to_proto() for layer in range(LAYERS)]
        return pb.RunConfig(world_size=self.world_size, wire_dtype=pb.WIRE_DTYPE_FP32, lora=lora, seed=self.run)

    def dropout_seed(self, step: int, micro: int, layer: int) -> int:
        return 1 + hash((self.run, self.rank, step, micro, layer)) % 2**32 if self.drops else 0


class Process(Protocol):
    """What a training needs of the process it runs in."""

    results: dict[Tensor, Buffer]  # of the latest outcome

    def cancel_later(self, call: Call, most_s: float) -> None: ...
    def was_cancelled(self, call: Call) -> bool: ...
    def release_later(self, ticket: int, delay_s: float) -> None: ...
    def ask_aside(self, call: Call) -> None: ...


class Training:
    """One life of a trainer: from the step its run has to the last one."""

    def __init__(
        self, plan: Plan, rng: random.Random, process: Process, may_leave: Callable[[], bool], reads: dict[int, str]
    ) -> None:
        self._plan, self._rng, self._process, self._may_leave = plan, rng, process, may_leave
        self._reads = reads  # what was read of the adapter, by step
        self._has_gone_back = False
        self.has_trained = False  # all steps; it leaves when all ranks of its run have

    def script(self, step: int) -> Script:
        plan = self._plan
        while step < plan.steps:
            if plan.edits:
                step = yield from self._edit(step)
            if plan.adapters:
                yield from self._change_adapters(step)
            if plan.weights and step == _MADE_AT:
                layers = [lora_of(layer, adapter=WEIGHTS).to_proto() for layer in range(LAYERS)]
                yield from self._create(spb.CreateAdapter(adapter=WEIGHTS, lora=layers, trainable=True))
            if self._rng.random() < plan.extras or plan.extras == 0.0:
                yield from self._read(step)
            yield from self._accumulate(step)
            step = yield from self._step(step)
        self.has_trained = True
        while not self._may_leave():  # somebody may yet have to repeat steps that need this rank
            yield Call(Op.NONE, spb.RequestOpen(), -_LINGER_S)
        yield from self._ask(Call(Op.LEAVE, spb.RequestOpen(leave=spb.Leave()), TIMEOUT_S))

    # Steps

    def _step(self, step: int) -> Generator[Call, Outcome, int]:
        while True:
            sets = [pb.TensorSet(adapter=name) for name in self._plan.active(step)]
            asked = spb.RequestOpen(grad_norm=spb.GradNorm(sets=sets, order=2.0))
            norm = yield from self._meet(Call(Op.GRAD_NORM, asked, TIMEOUT_S))
            if norm is None:
                continue
            scale = min(1.0, _MAX_NORM / (norm.norm + 1e-6))
            groups = [adamw(0.02 / (at + 1), scale, [each], weight_decay=0.01) for at, each in enumerate(sets)]
            if self._rng.random() < 3 * self._plan.extras:
                batch_now = batch(self._plan.run, self._plan.rank, step, 0)
                self._process.ask_aside(forward(0, *batch_now, keeps=False))
            opened = spb.RequestOpen(step=spb.Step(step=step + 1, groups=groups))
            stepped = yield from self._meet(Call(Op.STEP, opened, TIMEOUT_S))
            if stepped is not None:
                break
        assert stepped.step == step + 1, f"step {step + 1} was asked for, the run is at {stepped.step}"
        return int(stepped.step)

    def _meet(self, call: Call) -> Generator[Call, Outcome, spb.ResultHead | None]:
        """None where a barrier broke and the same is to be asked again."""
        call, error = yield call
        if isinstance(error, BarrierBroken):
            yield Call(Op.NONE, spb.RequestOpen(), -_RETRY_S)
            return None
        return _head(call, error)

    def _ask(self, call: Call) -> Generator[Call, Outcome, spb.ResultHead]:
        call, error = yield call
        return _head(call, error)

    # Passes

    def _accumulate(self, step: int) -> Script:
        plan = self._plan
        begins = True
        if self._rng.random() < plan.extras:
            yield from self._zeroed_window(step)
            begins = False
        while True:
            for micro in range(plan.micro_batches):
                yield from self._micro_batch(step, micro, begins=begins and micro == 0)
            if self._rng.random() >= plan.extras or (yield from self._cancelled_window(step)):
                return
            begins = True

    def _micro_batch(self, step: int, micro: int, *, begins: bool) -> Script:
        plan = self._plan
        x, ids, weights = batch(plan.run, plan.rank, step, micro)
        active = plan.active(step)
        tickets = []
        for layer in range(LAYERS):
            if self._rng.random() < plan.extras:
                yield from self._evaluate(layer, x, ids, weights)
            seed = plan.dropout_seed(step, micro, layer)
            call = yield from self._pass(
                lambda layer=layer, x=x, seed=seed: forward(layer, x, ids, weights, seed=seed, adapters=active)
            )
            x = x + self._result(Tensor.OUTPUT)
            tickets.append(call.request_id)
        dy = np.cos(x)
        for layer in reversed(range(LAYERS)):
            ticket = tickets[layer]
            yield from self._pass(lambda layer=layer, dy=dy, ticket=ticket: backward(layer, ticket, dy, begins, active))
            dy = dy + self._result(Tensor.GRAD_HIDDEN_STATES)

    def _pass(self, make: Callable[[], Call]) -> Generator[Call, Outcome, Call]:
        """Asked for again where it was cancelled."""
        while True:
            call, error = yield make()
            if error is None:
                return call
            told = f"{call.op.name} failed: {type(error).__name__}: {error}"
            assert isinstance(error, Cancelled) and self._process.was_cancelled(call), told  # noqa: PT018

    def _evaluate(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> Script:
        """A forward whose ticket nobody uses."""
        call = yield from self._pass(lambda: forward(layer, x, ids, weights))
        # A finalizer runs when it likes: while the forward is being repeated, too.
        self._process.release_later(call.request_id, self._rng.choice((0.0, 0.5, 30.0)))

    def _cancelled_window(self, step: int) -> Generator[Call, Outcome, bool]:
        """Begins a new window and cancels that. True where it was cancelled in time: the old window then still counts."""
        x, ids, weights = batch(self._plan.run, self._plan.rank, step, 0)
        taken = yield from self._pass(lambda: forward(0, x, ids, weights))
        begun = backward(0, taken.request_id, x, True)
        self._process.cancel_later(begun, 0.004)
        _, error = yield begun
        assert error is None or isinstance(error, Cancelled), error
        if error is not None:
            self._process.release_later(taken.request_id, 0.0)
        return error is not None

    def _zeroed_window(self, step: int) -> Script:
        """Gradients that are forgotten again."""
        x, ids, weights = batch(self._plan.run, self._plan.rank, step, 0)
        taken = yield from self._pass(lambda: forward(1, x, ids, weights))
        yield from self._pass(lambda: backward(1, taken.request_id, x, begins=False))
        yield from self._ask(Call(Op.ZERO_GRAD, spb.RequestOpen(zero_grad=spb.ZeroGrad()), TIMEOUT_S))

    def _result(self, tensor: Tensor) -> np.ndarray:
        return np.frombuffer(self._process.results[tensor].view, np.float32).reshape(-1, HIDDEN)

    # The adapter and its checkpoints

    def _read(self, step: int) -> Script:
        yield from self._ask(read_tensor(0, "b_down", EXPERTS * HIDDEN, RANK))
        digest = hashlib.sha256(self._process.results[Tensor.ADAPTER].view).hexdigest()
        assert self._reads.setdefault(step, digest) == digest, f"step {step} was read twice with different values"

    def _edit(self, step: int) -> Generator[Call, Outcome, int]:
        """What this step is to begin with; the step to go on with."""
        if step == _SAVED_AT:
            yield from self._save(f"{self._plan.name}-saved")
        elif step == _WRITTEN_AT:
            step = yield from self._write(step)
        elif step == _REWOUND_AT and not self._has_gone_back:
            opened = spb.RequestOpen(load_checkpoint=spb.CheckpointName(name=f"{self._plan.name}-saved"))
            loaded = yield from self._until_disk_works(Op.LOAD_CHECKPOINT, opened)
            self._has_gone_back = True
            assert loaded is not None
            assert loaded.step == _SAVED_AT, loaded
            return (yield from self._edit(_SAVED_AT))
        return step

    def _change_adapters(self, step: int) -> Script:
        """Other ranks do the same at the same step: what is there already stays as it is."""
        if step == _MADE_AT:
            lora = [lora_of(layer, adapter=MADE_LATER).to_proto() for layer in range(LAYERS)]
            for layer in lora:  # one after another, as PEFT does
                yield from self._create(spb.CreateAdapter(adapter=MADE_LATER, lora=[layer], initialise=True))
        elif step == _COPIED_AT:
            yield from self._create(spb.CreateAdapter(adapter=COPIED, copy_of=DEFAULT_ADAPTER))
            opened = spb.RequestOpen(delete_adapter=spb.AdapterName(adapter=MADE_LATER))
            yield from self._ask(Call(Op.DELETE_ADAPTER, opened, TIMEOUT_S))

    def _create(self, asked: spb.CreateAdapter) -> Script:
        yield from self._ask(Call(Op.CREATE_ADAPTER, spb.RequestOpen(create_adapter=asked), TIMEOUT_S))

    def _save(self, name: str) -> Script:
        """Of the same step's bits whoever saves it: where the name is taken, a predecessor has done it."""
        opened = spb.RequestOpen(save_checkpoint=spb.CheckpointName(name=name))
        yield from self._until_disk_works(Op.SAVE_CHECKPOINT, opened)

    def _until_disk_works(self, op: Op, opened: spb.RequestOpen) -> Generator[Call, Outcome, spb.ResultHead | None]:
        """None where the checkpoint is there already."""
        while True:
            call, error = yield Call(op, opened, TIMEOUT_S)
            is_being_written = isinstance(error, AlreadyExists) and "is being written" in str(error)
            if isinstance(error, AlreadyExists) and not is_being_written:
                return None
            if not is_being_written and not isinstance(error, OutOfCapacity):
                return _head(call, error)
            yield Call(Op.NONE, spb.RequestOpen(), -_DISK_RETRY_S)

    def _write(self, step: int) -> Generator[Call, Outcome, int]:
        """A parameter, a moment of another tensor, and a step count as if this step had been taken."""
        generator = np.random.default_rng([self._plan.run, step])
        parameter = generator.standard_normal((EXPERTS * HIDDEN, RANK)).astype(np.float32)
        moment = generator.standard_normal((EXPERTS * RANK, HIDDEN)).astype(np.float32)
        yield from self._ask(write_tensor(0, "b_down", "parameter", parameter, 0))
        yield from self._ask(write_tensor(1, "a_gate", "exp_avg", moment, step + 1))
        opened = spb.RequestOpen(set_step=spb.SetStep(step=step + 1))
        head = yield from self._ask(Call(Op.SET_STEP, opened, TIMEOUT_S))
        assert head.step == step + 1, head.step
        return step + 1


def _head(call: Call, error: KtExpertError | None) -> spb.ResultHead:
    if error is not None:
        raise AssertionError(f"{call.op.name} failed: {type(error).__name__}: {error}")
    assert call.head is not None
    return call.head
