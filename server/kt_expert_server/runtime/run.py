"""Runs and members: the state that lives on the server between calls."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

import kt_expert_native as native

from kt_expert_server.errors import ServerError
from kt_expert_server.runtime.barrier import Barrier
from kt_expert_server.runtime.optimizer import StepParams
from kt_expert_server.runtime.signal import Signal

REMEMBERED_TICKETS = 4096  # consumed ticket ids kept per member, to tell a second use from an unknown one


@dataclass(frozen=True, slots=True)
class LayerLora:
    """LoRA of one layer; the fields are those of the protocol."""

    layer: int
    tied: bool
    rank_gate: int
    rank_up: int
    rank_down: int
    scale_gate: float
    scale_up: float
    scale_down: float
    dropout: float = 0.0

    def native(self) -> native.LoraSpec:
        return native.LoraSpec(
            tied=self.tied,
            rank_gate=self.rank_gate,
            rank_up=self.rank_up,
            rank_down=self.rank_down,
            scale_gate=self.scale_gate,
            scale_up=self.scale_up,
            scale_down=self.scale_down,
            dropout=self.dropout,
        )


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What makes two openings of one name the same run."""

    world_size: int
    wire_dtype: str  # "bf16" or "fp32"
    lora: tuple[LayerLora, ...]
    seed: int
    moment_dtype: str = "fp32"  # or "bf16"
    tickets: str = "activations"  # or "inputs"


@dataclass(slots=True)
class LayerAdapter:
    """fp32 master parameters and the optimizer's state of one layer. The state exists from the first step on."""

    spec: native.LoraSpec
    parameters: native.LoraTensors
    state: native.OptimizerState | None = None


@dataclass(slots=True)
class SavedTicket:
    """A ticket with what a backward has to agree with."""

    ticket: native.Ticket
    layer: int
    with_adapter: bool
    adapter_version: int
    size_bytes: int


@dataclass(slots=True)
class Outcome:
    """Frames of a finished request, kept until the member acknowledges it."""

    frames: list[bytes]
    size_bytes: int
    credit_bytes: int | None  # None for a request that was refused before it took credits


class FrameSink(Protocol):
    """Where a member's frames go: the session that is attached at the moment."""

    def send(self, frames: list[bytes]) -> None: ...

    def close(self, error: ServerError) -> None:
        """Ends the stream with this error."""


@dataclass(slots=True)
class Member:
    """One trainer process of a run."""

    token: str
    run: Run
    rank: int
    epoch: int = 1
    sink: FrameSink | None = None
    last_seen: float = field(default_factory=time.monotonic)
    last_request_id: int = 0
    credit_requests_used: int = 0
    credit_bytes_used: int = 0
    tickets: dict[int, SavedTicket] = field(default_factory=dict)
    consumed: OrderedDict[int, str] = field(default_factory=OrderedDict)
    gradients: dict[int, native.LoraTensors] = field(default_factory=dict)
    window: set[int] = field(default_factory=set)  # layers whose gradients belong to the open window
    outcomes: dict[int, Outcome] = field(default_factory=dict)
    running: dict[int, int] = field(default_factory=dict)  # request id -> its credit bytes
    dropped: set[int] = field(default_factory=set)  # ids whose stream ended before the request was complete
    cancels: dict[int, native.CancelToken] = field(default_factory=dict)
    changed: Signal = field(default_factory=Signal)  # a request opened, ended or was dropped, or the member left
    has_left: bool = False

    def forget_ticket(self, ticket_id: int, how: str) -> None:
        self.consumed[ticket_id] = how
        while len(self.consumed) > REMEMBERED_TICKETS:
            self.consumed.popitem(last=False)

    def finish(self, request_id: int) -> None:
        """The request runs no more, whatever became of it."""
        self.running.pop(request_id, None)
        self.changed.notify()

    def close_window(self) -> None:
        """Gradients accumulated so far no longer count; their memory is reused."""
        self.window.clear()


@dataclass(slots=True)
class Run:
    """One fine-tuning job on the loaded base model."""

    name: str
    config: RunConfig
    ephemeral: bool
    adapters: dict[int, LayerAdapter]
    reserved_bytes: dict[str, int]
    step_barrier: Barrier[StepParams, int]
    norm_barrier: Barrier[None, float]
    members: dict[int, Member] = field(default_factory=dict)
    adapter_version: int = 0
    created: float = field(default_factory=time.monotonic)

    @property
    def step(self) -> int:
        return self.step_barrier.completed

    @property
    def optimizer(self) -> str:
        """The kind whose state the run holds; empty before the first step."""
        states = [adapter.state for adapter in list(self.adapters.values())]  # a step may replace them meanwhile
        return next((state.kind for state in states if state is not None), "")

    @property
    def adapter_bytes(self) -> int:
        return sum(adapter.parameters.nbytes for adapter in self.adapters.values())
