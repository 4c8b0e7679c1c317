"""What the server reports while it works. The metrics implement this; the core knows no metrics library."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """All durations in seconds, all sizes in bytes. `direction` is "forward" or "backward"."""

    def stage(self, direction: str, stage: str, seconds: float) -> None:
        """stage: receive, queue, compute, send."""

    def computed(self, direction: str, tokens: int, flops: float) -> None: ...

    def engine_stage(self, direction: str, stage: str, seconds: float) -> None:
        """stage: gather, gate_up, activation, down, lora, scatter, gradients."""

    def shared(self, direction: str, batches: int) -> None:
        """So many batches share a pass over the weights."""

    def fast(self, forwards: int, busy: int, tokens: int, flops: float, seconds: float) -> None:
        """Small forwards that went past the scheduler, and those that found the engine at work."""

    def imbalance(self, layer: int, ratio: float) -> None:
        """Most tokens of an expert over the mean of all experts."""

    def rejected(self, reason: str) -> None:
        """reason: the name of a status code."""

    def duplicate(self) -> None: ...

    def step(self, seconds: float) -> None: ...

    def checkpoint(self, operation: str, seconds: float) -> None:
        """operation: save, load."""


class NullObserver:
    """Reports nowhere."""

    def stage(self, direction: str, stage: str, seconds: float) -> None:
        del direction, stage, seconds

    def computed(self, direction: str, tokens: int, flops: float) -> None:
        del direction, tokens, flops

    def engine_stage(self, direction: str, stage: str, seconds: float) -> None:
        del direction, stage, seconds

    def shared(self, direction: str, batches: int) -> None:
        del direction, batches

    def fast(self, forwards: int, busy: int, tokens: int, flops: float, seconds: float) -> None:
        del forwards, busy, tokens, flops, seconds

    def imbalance(self, layer: int, ratio: float) -> None:
        del layer, ratio

    def rejected(self, reason: str) -> None:
        del reason

    def duplicate(self) -> None: ...

    def step(self, seconds: float) -> None:
        del seconds

    def checkpoint(self, operation: str, seconds: float) -> None:
        del operation, seconds
