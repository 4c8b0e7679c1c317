"""Tickets of one member: what its forwards saved for their backwards."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import kt_expert_native as native

from kt_expert_server.adapters.adapter import Adapter, AdapterLayer
from kt_expert_server.adapters.stacking import Active
from kt_expert_server.engine.budget import Reservation
from kt_expert_server.errors import InvalidRequest, NotFound, WrongPhase

REMEMBERED_TICKETS = 4096  # consumed ticket ids kept per member, to tell a second use from an unknown one


@dataclass(frozen=True, slots=True)
class UsedAdapter:
    """An adapter that was active in a forward, as it was then."""

    name: str
    active: Active
    version: int


@dataclass(frozen=True, slots=True)
class UsedWeights:
    """Weights of an adapter that a forward computed with in place of the base model's, as they were then."""

    name: str
    layer: AdapterLayer
    version: int


@dataclass(slots=True)
class SavedTicket:
    """A ticket with what a backward has to agree with."""

    tickets: tuple[native.Ticket, ...]  # of the forward's parts
    layer: int
    used: tuple[UsedAdapter, ...]
    weights: UsedWeights | None  # None: the base model's
    stacked: native.AdapterTensors | None  # where several were active
    reservation: Reservation

    def is_stale(self, adapters: Mapping[str, Adapter]) -> bool:
        """An adapter has changed since, or is gone."""
        used = [(each.name, each.active.layer, each.version) for each in self.used]
        if self.weights is not None:
            used.append((self.weights.name, self.weights.layer, self.weights.version))
        return any(
            name not in adapters or adapters[name].layers.get(self.layer) is not layer or layer.version != version
            for name, layer, version in used
        )


class Tickets:
    """By the request id of the forward. Used from one thread; memory of dropped ones goes to `retired`."""

    def __init__(self, retired: list[native.Ticket]) -> None:
        self._saved: dict[int, SavedTicket] = {}
        self._consumed: OrderedDict[int, str] = OrderedDict()
        self._retired = retired

    def __len__(self) -> int:
        return len(self._saved)

    @property
    def size_bytes(self) -> int:
        return sum(saved.reservation.size_bytes for saved in self._saved.values())

    def add(self, ticket_id: int, saved: SavedTicket) -> None:
        self._saved[ticket_id] = saved

    def peek(self, ticket_id: int) -> SavedTicket | None:
        return self._saved.get(ticket_id)

    def find(self, ticket_id: int, layer: int, adapters: Mapping[str, Adapter]) -> SavedTicket:
        """For the backward of `layer`. Raises WrongPhase for one that was used or is stale, NotFound, InvalidRequest."""
        saved = self._saved.get(ticket_id)
        if saved is None:
            how = self._consumed.get(ticket_id)
            if how is not None:
                raise WrongPhase(f"ticket {ticket_id} was already {how}; a ticket serves exactly one backward")
            raise NotFound(f"ticket {ticket_id} does not exist; run the forward with save_for_backward and name its request id")
        if saved.layer != layer:
            raise InvalidRequest(f"ticket {ticket_id} belongs to layer {saved.layer}, not to layer {layer}")
        if saved.is_stale(adapters):
            raise WrongPhase(
                f"an adapter changed since the forward of ticket {ticket_id}; run the forward again, then backward"
            )
        return saved

    def drop(self, ticket_id: int, how: str) -> None:
        """Does nothing for a ticket that is gone already."""
        saved = self._saved.pop(ticket_id, None)
        if saved is None:
            return
        saved.reservation.release()
        self._retired += saved.tickets
        self._consumed[ticket_id] = how
        while len(self._consumed) > REMEMBERED_TICKETS:
            self._consumed.popitem(last=False)

    def keep_only(self, wanted: Collection[int], up_to: int, how: str) -> None:
        """Drops those with ids up to `up_to` that are not among `wanted`."""
        for ticket_id in [each for each in self._saved if each <= up_to and each not in wanted]:
            self.drop(ticket_id, how)

    def drop_all(self, how: str) -> None:
        for ticket_id in list(self._saved):
            self.drop(ticket_id, how)
