"""The runs of the server: opening, joining, leaving, leases and draining."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from itertools import zip_longest

import kt_expert_native as native
import numpy as np

from kt_expert_server.config import Limits
from kt_expert_server.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    OutOfCapacity,
    ServerUnavailable,
    WrongPhase,
)
from kt_expert_server.model.loader import BaseModel
from kt_expert_server.runtime.barrier import Barrier
from kt_expert_server.runtime.memory import Kind, MemoryBudget
from kt_expert_server.runtime.names import check_name
from kt_expert_server.runtime.run import LayerAdapter, LayerLora, Member, Run, RunConfig

_MAX_WORLD_SIZE = 1024
_STATES = ("adamw", "sgd", "adafactor")  # a run chooses its optimizer at the first step
_TOKEN_BYTES = 16


class State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Registry:
    """Owns every run and member. Used from the event loop only."""

    def __init__(self, budget: MemoryBudget, limits: Limits, threads: int) -> None:
        self.state = State.LOADING
        self.model: BaseModel | None = None
        self.runs: dict[str, Run] = {}
        self.budget = budget
        self.limits = limits
        self._threads = threads  # of the engine: each has scratch of its own
        self.is_stopping = False
        self._members: dict[str, Member] = {}
        self._drain_listeners: list[Callable[[], None]] = []

    def become_ready(self, model: BaseModel) -> None:
        self.model = model
        if self.state is State.LOADING:
            self.state = State.READY

    def loaded_model(self) -> BaseModel:
        if self.model is None:
            raise ServerUnavailable("the model is still loading; try again when /readyz answers 200")
        return self.model

    def drain(self) -> None:
        """No new runs and members; those that are there go on."""
        self.state = State.DRAINING
        for listener in self._drain_listeners:
            listener()

    def on_drain(self, listener: Callable[[], None]) -> None:
        self._drain_listeners.append(listener)

    def stop(self) -> None:
        """Drains, and takes no new requests either."""
        self.drain()
        self.is_stopping = True

    def _require_accepting(self) -> None:
        if self.state is State.DRAINING:
            raise ServerUnavailable("the server is draining and takes no new runs or members; connect to another one")

    def open_run(self, name: str, config: RunConfig, ephemeral: bool) -> tuple[Run, bool]:
        """Returns the run and whether it was created. A new run's adapter is zero until initialise() ran on the engine."""
        model = self.loaded_model()
        check_name("run", name)
        existing = self.runs.get(name)
        if existing is not None:
            differences = describe_differences(existing.config, config)
            if differences:
                raise AlreadyExists(
                    f"run {name!r} exists with another configuration: {differences}; choose another name or close it"
                )
            return existing, False
        self._require_accepting()
        self._validate(model, config)
        run = Run(
            name,
            config,
            ephemeral,
            {},
            self._reserve(name, model, config),
            Barrier("step", config.world_size),
            Barrier("grad norm", config.world_size),
        )
        for lora in config.lora:
            spec = lora.native()
            run.adapters[lora.layer] = LayerAdapter(spec, native.LoraTensors(model.layers[lora.layer].spec, spec))
        self.runs[name] = run
        return run, True

    def _validate(self, model: BaseModel, config: RunConfig) -> None:
        if not 1 <= config.world_size <= _MAX_WORLD_SIZE:
            raise InvalidRequest(f"world size is {config.world_size}, expected 1 to {_MAX_WORLD_SIZE}")
        seen: set[int] = set()
        for lora in config.lora:
            if lora.layer not in model.layers:
                raise NotFound(f"layer {lora.layer} has no experts; layers with experts: {describe_layers(model)}")
            if lora.layer in seen:
                raise InvalidRequest(f"layer {lora.layer} has two LoRA entries, expected one")
            seen.add(lora.layer)
            try:
                lora.native()
            except native.InvalidArgument as error:
                raise InvalidRequest(f"layer {lora.layer}: {error}") from error

    def _reserve(self, name: str, model: BaseModel, config: RunConfig) -> dict[str, int]:
        size = sum(adapter_bytes(model, lora) for lora in config.lora)
        sizes = {
            Kind.ADAPTERS: size,
            Kind.GRADIENTS: size * config.world_size,
            Kind.OPTIMIZER: sum(optimizer_bytes(model, lora, config.moment_dtype) for lora in config.lora),
            # A step must not fail because other runs' tickets are many.
            Kind.SCRATCH: max((self._step_bytes(model, lora, config.world_size) for lora in config.lora), default=0),
        }
        done: dict[str, int] = {}
        try:
            for kind, amount in sizes.items():
                self.budget.reserve(kind, amount, f"run {name!r}: its {kind}")
                done[kind] = amount
        except OutOfCapacity:
            for kind_name, amount in done.items():
                self.budget.release(Kind(kind_name), amount)
            raise
        return done

    def _step_bytes(self, model: BaseModel, lora: LayerLora, ranks: int) -> int:
        spec = model.layers[lora.layer].spec
        return max(native.Engine.step_bytes(spec, lora.native(), kind, ranks, self._threads) for kind in _STATES)

    def run_named(self, name: str) -> Run:
        if name not in self.runs:
            known = ", ".join(sorted(self.runs)) or "none"
            raise NotFound(f"run {name!r} is not open; open runs: {known}")
        return self.runs[name]

    def member(self, token: str) -> Member:
        if token not in self._members:
            raise NotFound("this member is not joined, or its lease ran out; join the run again")
        return self._members[token]

    def join(self, name: str, rank: int, resume: str = "") -> Member:
        """A second join of a rank fences the first.

        With `resume`, the token of the membership it continues, tickets, gradients and outcomes are kept under a new epoch
        and token; without, the rank starts afresh.
        """
        run = self.run_named(name)
        if not 0 <= rank < run.config.world_size:
            raise InvalidRequest(f"rank {rank} is outside [0, {run.config.world_size}) of run {name!r}")
        existing = run.members.get(rank)
        epoch = existing.epoch + 1 if existing is not None else 1
        if existing is not None:
            fence = WrongPhase(f"rank {rank} of run {name!r} was joined again: epoch {epoch} replaces this one")
            if existing.sink is not None:
                existing.sink.close(fence)
            if resume and resume == existing.token:
                return self._resume(existing, epoch)
            self._remove(existing)
        self._require_accepting()
        if len(self._members) >= self.limits.max_members:
            raise OutOfCapacity(f"{len(self._members)} members are joined, the limit is {self.limits.max_members}")
        member = Member(secrets.token_urlsafe(_TOKEN_BYTES), run, rank, epoch)
        run.members[rank] = member
        self._members[member.token] = member
        return member

    def _resume(self, member: Member, epoch: int) -> Member:
        """The same member under a new token, so that calls of its fenced predecessor find nothing."""
        del self._members[member.token]
        member.token, member.epoch, member.sink = secrets.token_urlsafe(_TOKEN_BYTES), epoch, None
        member.last_seen = time.monotonic()
        self._members[member.token] = member
        return member

    def leave(self, member: Member) -> None:
        """Frees what the member holds; the run goes on, unless it was ephemeral and this was its last member."""
        if member.sink is not None:
            member.sink.close(WrongPhase("the member left the run"))
        self._remove(member)
        if member.run.ephemeral and not member.run.members:
            self.close(member.run)

    def _remove(self, member: Member) -> None:
        run = member.run
        member.has_left, member.sink = True, None
        for token in member.cancels.values():
            token.cancel()
        for ticket_id in list(member.tickets):
            self.drop_ticket(member, ticket_id, "released when its member left")
        self.budget.drop_kept()  # for those who stay it is one fresh ticket
        for outcome in member.outcomes.values():
            self.budget.release(Kind.OUTCOMES, outcome.size_bytes)
        member.outcomes.clear()
        run.members.pop(member.rank, None)
        self._members.pop(member.token, None)
        run.step_barrier.withdraw(member.rank)
        run.norm_barrier.withdraw(member.rank)
        member.changed.notify()

    def close(self, run: Run) -> None:
        if self.runs.get(run.name) is run:
            del self.runs[run.name]
        gone = NotFound(f"run {run.name!r} was closed")
        run.step_barrier.abort(gone)
        run.norm_barrier.abort(gone)
        for member in list(run.members.values()):
            self.leave(member)
        for kind, size in run.reserved_bytes.items():
            self.budget.release(Kind(kind), size)
        run.reserved_bytes.clear()
        run.adapters.clear()

    def drop_ticket(self, member: Member, ticket_id: int, how: str) -> None:
        saved = member.tickets.pop(ticket_id)
        self.budget.release(Kind.TICKETS, saved.size_bytes)
        member.forget_ticket(ticket_id, how)

    def expire(self) -> list[Member]:
        """Drops members whose lease ran out without a stream. Returns them."""
        now = time.monotonic()
        if not self._members:
            self.budget.drop_kept()  # of operations that outlasted their member
        late = [
            member
            for member in self._members.values()
            if member.sink is None and not member.running and now - member.last_seen > self.limits.lease_s
        ]
        for member in late:
            self.leave(member)
        # A run that was opened and never joined would otherwise stay for good.
        for run in list(self.runs.values()):
            if run.ephemeral and not run.members and now - run.created > self.limits.lease_s:
                self.close(run)
        return late

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no accepted request lacks an outcome. False where that took too long; what runs is then cancelled."""
        deadline = time.monotonic() + timeout_s
        while busy := next((member for member in self.members if member.running), None):
            try:
                await busy.changed.wait_for(lambda member=busy: not member.running, deadline - time.monotonic())  # type: ignore[misc]
            except TimeoutError:
                for member in self.members:
                    for token in member.cancels.values():
                        token.cancel()
                return False
        return True


def optimizer_bytes(model: BaseModel, lora: LayerLora, moment_dtype: str) -> int:
    """Of the largest state an optimizer may need."""
    spec, ranks = model.layers[lora.layer].spec, lora.native()
    return max(native.OptimizerState.bytes_of(spec, ranks, kind, moment_dtype) for kind in _STATES)


def adapter_bytes(model: BaseModel, lora: LayerLora) -> int:
    """fp32 bytes of one set of tensors."""
    spec = model.layers[lora.layer].plan
    hidden, inter = spec.hidden_size, spec.intermediate_size
    a_up = 0 if lora.tied else lora.rank_up * hidden
    floats = lora.rank_gate * (hidden + inter) + a_up + lora.rank_up * inter + lora.rank_down * (inter + hidden)
    return spec.num_experts * floats * 4


def describe_differences(existing: RunConfig, asked: RunConfig) -> str:
    """What two configurations say differently; empty where nothing."""
    found = []
    for each in fields(RunConfig):
        ours, theirs = getattr(existing, each.name), getattr(asked, each.name)
        if ours == theirs:
            continue
        if each.name == "lora":
            layers = zip_longest(existing.lora, asked.lora)
            ours, theirs = next(pair for pair in layers if pair[0] != pair[1])
        found.append(f"{each.name} is {ours}, asked for {theirs}")
    return "; ".join(found)


def describe_layers(model: BaseModel) -> str:
    indices = sorted(model.layers)
    return f"{indices[0]} to {indices[-1]} ({len(indices)})"


def initialise(run: Run) -> None:
    """A uniform in +-1/sqrt(fan_in), the bound of PEFT's kaiming_uniform(a=sqrt(5)); B zero. Seeded per tensor."""
    for layer, adapter in run.adapters.items():
        for position, name in enumerate(("a_gate", "a_up", "a_down")):
            if name not in adapter.parameters.names():
                continue
            tensor = adapter.parameters.tensor(name)
            generator = np.random.Generator(np.random.Philox(key=[run.config.seed, layer * 4 + position]))
            bound = tensor.shape[2] ** -0.5
            tensor[...] = generator.uniform(-bound, bound, tensor.shape).astype(np.float32)
