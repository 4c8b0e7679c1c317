"""The memory budget: everything the server holds for trainers is reserved here first, so that too much is an error of
one request and never the end of the process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.quotas import Quotas
from kt_expert_server.errors import OutOfCapacity
from kt_expert_server.model.memory_plan import format_bytes


class Keeper(Protocol):
    """What keeps memory of past operations: the engine, and the pool of buffers."""

    @property
    def kept_bytes(self) -> int: ...
    def drop_kept(self) -> None: ...


class Reservation:
    """Bytes of one kind that belong to one owner, until they are released."""

    def __init__(self, budget: MemoryBudget, kind: Kind, size_bytes: int, owner: str) -> None:
        self._budget = budget
        self.kind = kind
        self.owner = owner
        self.identity = budget.quotas.identity_of(owner)  # whose quota it counts for, until it is given back
        self.size_bytes = size_bytes

    def shrink(self, size_bytes: int) -> None:
        """Keeps only so much: what was reserved turned out to be an upper bound."""
        assert 0 <= size_bytes <= self.size_bytes, (size_bytes, self.size_bytes)  # noqa: S101
        self._budget._give_back(self, self.size_bytes - size_bytes)
        self.size_bytes = size_bytes

    def release(self) -> None:
        """Safe to call twice."""
        self.shrink(0)


class MemoryBudget:
    """Reserved bytes by kind and by owner against one limit. Used from one thread only."""

    def __init__(self, limit_bytes: int, keepers: Iterable[Keeper] = (), quotas: Quotas | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.quotas = quotas or Quotas({})
        self._keepers = tuple(keepers)
        self._by_kind = dict.fromkeys(Kind, 0)
        self._by_owner: dict[str, int] = {}

    def reserved(self, kind: Kind) -> int:
        if kind is Kind.KEPT:
            return sum(keeper.kept_bytes for keeper in self._keepers)
        return self._by_kind[kind]

    def owned(self, owner: str) -> int:
        """All that one owner has reserved."""
        return self._by_owner.get(owner, 0)

    @property
    def total(self) -> int:
        return sum(self._by_kind.values()) + self.reserved(Kind.KEPT)

    @property
    def is_sound(self) -> bool:
        """Nothing was given back that was not taken."""
        return min(self._by_kind.values()) >= 0

    def drop_kept(self) -> None:
        """Gives what past operations left back to the system."""
        for keeper in self._keepers:
            keeper.drop_kept()

    def reserve(self, kind: Kind, size_bytes: int, owner: str, what: str) -> Reservation:
        """Takes the place of kept memory where it has to. Raises OutOfCapacity with the numbers where `size_bytes` more do
        not fit even so, OverQuota where they are too many for the owner's identity."""
        self.quotas.require(kind, size_bytes, owner, what)
        if size_bytes > self.limit_bytes - self.total:
            self.drop_kept()
        free = self.limit_bytes - self.total
        if size_bytes > free:
            raise OutOfCapacity(
                f"{what} needs {format_bytes(size_bytes)} and {format_bytes(max(free, 0))} of the limit of "
                f"{format_bytes(self.limit_bytes)} are free; send fewer tokens, release tickets, close runs that have ended "
                "(kt-expert runs ls, close), or use a bigger host",
                missing_bytes=size_bytes - free,
            )
        return self.record(kind, size_bytes, owner)

    def record(self, kind: Kind, size_bytes: int, owner: str) -> Reservation:
        """Counts what exists already and cannot be refused any more."""
        self._by_kind[kind] += size_bytes
        self._by_owner[owner] = self._by_owner.get(owner, 0) + size_bytes
        reservation = Reservation(self, kind, size_bytes, owner)
        self.quotas.count(kind, size_bytes, reservation.identity)
        return reservation

    def _give_back(self, reservation: Reservation, size_bytes: int) -> None:
        self._by_kind[reservation.kind] -= size_bytes
        self.quotas.count(reservation.kind, -size_bytes, reservation.identity)
        left = self._by_owner.get(reservation.owner, 0) - size_bytes
        assert left >= 0 <= self._by_kind[reservation.kind], reservation.owner  # noqa: S101
        if left:
            self._by_owner[reservation.owner] = left
        else:
            self._by_owner.pop(reservation.owner, None)


class Holdings:
    """Reservations that end together."""

    def __init__(self) -> None:
        self._held: list[Reservation] = []

    def add(self, reservation: Reservation) -> Reservation:
        self._held.append(reservation)
        return reservation

    def __iter__(self) -> Iterator[Reservation]:
        return iter(self._held)

    def take(self) -> list[Reservation]:
        """They belong to the caller from here on."""
        taken, self._held = self._held, []
        return taken

    def release(self) -> None:
        """Safe to call twice."""
        for reservation in self._held:
            reservation.release()
        self._held.clear()
