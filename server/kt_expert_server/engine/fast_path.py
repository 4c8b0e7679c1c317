"""Small forwards that keep nothing, which one trainer's connection may ask of the engine past all else (native fast_path.h)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import kt_expert_native as native

from kt_expert_server.adapters.stacking import Scales
from kt_expert_server.engine.budget import MemoryBudget, Reservation
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import OutOfCapacity
from kt_expert_server.observe.observer import Observer

NOT_GRANTED = 0
_MOST_ENTRIES = 4096  # layers times sets of adapters


@dataclass(frozen=True, slots=True)
class FastForward:
    """What such forwards compute with. `key`: whatever has the same is the same, until it is revoked."""

    key: Hashable
    weights: native.LayerWeights
    parameters: native.AdapterTensors | None
    scales: Scales | None
    dtype: str
    top_k: int
    scratch_bytes: int


class FastForwards(Protocol):
    """Of one connection."""

    def grant(self, wanted: FastForward, owner: str) -> int:
        """The number that its trainer asks with; NOT_GRANTED where there is no memory."""

    def revoke(self) -> None:
        """Nothing that was granted is used any more when this returns."""

    def report(self, observer: Observer) -> None:
        """What was computed since the last report."""


class GrantedForwards:
    """Implements FastForwards. Used from the event loop's thread, but for stop()."""

    def __init__(
        self, engine: native.Engine, gate: native.Gate, budget: MemoryBudget, descriptor: int, spin_s: float, first_entry: int
    ) -> None:  # fmt: skip
        """Takes the descriptor, unless it raises. Entries are counted from `first_entry` on, which should be random: those of
        two connections are never the same then."""
        self._path = native.FastPath(engine, gate, descriptor, spin_s, first_entry)
        self._budget = budget
        self._granted: dict[Hashable, tuple[int, FastForward]] = {}  # with what the native side uses
        self._scratch: Reservation | None = None

    def grant(self, wanted: FastForward, owner: str) -> int:
        known = self._granted.get(wanted.key)
        if known is not None:
            return known[0]
        if len(self._granted) >= _MOST_ENTRIES or not self._reserve(wanted.scratch_bytes, owner):
            return NOT_GRANTED
        number = self._path.grant(wanted.weights, wanted.parameters, wanted.scales, wanted.dtype, wanted.top_k)
        self._granted[wanted.key] = number, wanted
        return number

    def revoke(self) -> None:
        if self._granted:
            self._path.revoke()
            self._granted.clear()
        if self._scratch is not None:
            self._scratch.release()
            self._scratch = None

    def report(self, observer: Observer) -> None:
        counts = self._path.take_counts()
        observer.fast(
            round(counts["forwards"]), round(counts["busy"]), round(counts["tokens"]), counts["flops"], counts["seconds"]
        )

    def stop(self) -> None:
        """Ends the connection. Waits for a forward that is under way."""
        self._path.stop()

    def _reserve(self, size_bytes: int, owner: str) -> bool:
        """One forward runs at a time: the largest counts."""
        if self._scratch is not None and self._scratch.size_bytes >= size_bytes:
            return True
        try:
            held = self._budget.reserve(Kind.SCRATCH, size_bytes, owner, "small forwards")
        except OutOfCapacity:
            return False
        if self._scratch is not None:
            self._scratch.release()
        self._scratch = held
        return True
