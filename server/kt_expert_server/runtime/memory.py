"""The memory budget: everything the server holds for trainers is reserved here first, so that too much is an error of
one request and never the end of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol

from kt_expert_server.errors import OutOfCapacity
from kt_expert_server.model.memory_plan import format_bytes


class Kind(StrEnum):
    WEIGHTS = "weights"
    RUNTIME = "runtime"
    ADAPTERS = "adapters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    TICKETS = "tickets"
    KEPT = "kept"  # scratch and memory of tickets that are gone, for operations to come
    REQUESTS = "requests"
    OUTCOMES = "outcomes"
    SCRATCH = "scratch"


class Keeper(Protocol):
    """What keeps memory of past operations: the engine."""

    @property
    def kept_bytes(self) -> int: ...
    def drop_kept(self) -> None: ...


class MemoryBudget:
    """Reserved bytes by kind against one limit. Used from the event loop only."""

    def __init__(self, limit_bytes: int, keeper: Keeper | None = None) -> None:
        self.limit_bytes = limit_bytes
        self._keeper = keeper
        self._reserved = dict.fromkeys(Kind, 0)

    def reserved(self, kind: Kind) -> int:
        if kind is Kind.KEPT:
            return self._keeper.kept_bytes if self._keeper is not None else 0
        return self._reserved[kind]

    @property
    def total(self) -> int:
        return sum(self.reserved(kind) for kind in Kind)

    def drop_kept(self) -> None:
        """Gives what past operations left back to the system."""
        if self._keeper is not None:
            self._keeper.drop_kept()

    def reserve(self, kind: Kind, size_bytes: int, what: str) -> None:
        """Takes the place of kept memory where it has to. Raises OutOfCapacity with the numbers where `size_bytes`
        more do not fit even so."""
        if size_bytes > self.limit_bytes - self.total:
            self.drop_kept()
        free = self.limit_bytes - self.total
        if size_bytes > free:
            raise OutOfCapacity(
                f"{what} needs {format_bytes(size_bytes)} and {format_bytes(max(free, 0))} of the limit of "
                f"{format_bytes(self.limit_bytes)} are free; send fewer tokens, release tickets, or use a bigger host"
            )
        self._reserved[kind] += size_bytes

    def record(self, kind: Kind, size_bytes: int) -> None:
        """Counts what exists already and cannot be refused any more."""
        self._reserved[kind] += size_bytes

    @contextmanager
    def held(self, kind: Kind, size_bytes: int, what: str) -> Iterator[None]:
        """Reserves for the length of a block."""
        self.reserve(kind, size_bytes, what)
        try:
            yield
        finally:
            self.release(kind, size_bytes)

    def release(self, kind: Kind, size_bytes: int) -> None:
        self._reserved[kind] -= size_bytes
