"""The requests of one member that were received and whose outcomes are not acknowledged.

Requests run in the order of their ids and outcomes leave in that order, so two numbers describe a member's past: what was
received, and what was acknowledged.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from kt_expert_proto.header import FrameError, Header, Tensor
from kt_expert_proto.v1.session_pb2 import RequestOpen

from kt_expert_server.engine.budget import Holdings
from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.engine.work import Outcome
from kt_expert_server.errors import ServerError


class Phase(enum.Enum):
    QUEUED = enum.auto()  # waits for the requests before it, or for the engine
    AT_BARRIER = enum.auto()  # waits for other members
    RUNNING = enum.auto()
    DONE = enum.auto()  # has its outcome


@dataclass(eq=False, slots=True)
class Entry:
    """One request, from its first frame to the acknowledgement of its outcome."""

    request_id: int
    header: Header
    opened: RequestOpen
    received_at: float
    deadline: float
    complete_at: float = 0.0  # all its tensors are there
    credit_bytes: int | None = None  # None: refused before it took credits
    tensors: dict[Tensor, PooledBuffer] = field(default_factory=dict)
    held: Holdings = field(default_factory=Holdings)  # its tensors, until it has run
    outcome_held: Holdings = field(default_factory=Holdings)  # its results, until they are acknowledged
    refusal: ServerError | None = None  # the outcome it will have when its turn comes
    phase: Phase = Phase.QUEUED
    outcome: Outcome | None = None

    def drop_tensors(self) -> None:
        """The request has run or will not: its tensors are not read any more."""
        for buffer in self.tensors.values():
            buffer.release()
        self.tensors = {}
        self.held.release()

    def drop_outcome(self) -> None:
        if self.outcome is not None:
            self.outcome.release()
        self.outcome_held.release()


class ReplayLog:
    """Entries in the order of their ids."""

    def __init__(self, acknowledged: int) -> None:
        self.received = acknowledged  # whole requests, or refused ones
        self.acknowledged = acknowledged
        self._entries: dict[int, Entry] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, request_id: int) -> Entry | None:
        return self._entries.get(request_id)

    def add(self, entry: Entry) -> None:
        assert entry.request_id > self.received, (entry.request_id, self.received)  # noqa: S101
        self._entries[entry.request_id] = entry
        self.received = entry.request_id

    def head(self) -> Entry | None:
        """The first request without an outcome."""
        return next((entry for entry in self if entry.phase is not Phase.DONE), None)

    def settle(self, entry: Entry, outcome: Outcome) -> None:
        """Outcomes come in the order of requests."""
        assert entry is self.head(), f"request {entry.request_id} got its outcome out of order"  # noqa: S101
        entry.outcome, entry.phase = outcome, Phase.DONE

    @property
    def last_settled(self) -> int:
        head = self.head()
        if head is None:
            return self.received
        done = [entry.request_id for entry in self if entry.phase is Phase.DONE]
        return done[-1] if done else self.acknowledged

    def acknowledge(self, up_to: int) -> list[Entry]:
        """Entries whose outcomes are not needed any more. Raises FrameError for an outcome that was never sent."""
        if up_to <= self.acknowledged:
            return []  # acknowledged before
        if up_to > self.last_settled:
            raise FrameError(f"outcomes up to {up_to} were acknowledged, the last one sent is that of {self.last_settled}")
        done = [entry for entry in self if entry.request_id <= up_to]
        for entry in done:
            del self._entries[entry.request_id]
        self.acknowledged = up_to
        return done

    def clear(self) -> list[Entry]:
        """All entries; the member is gone."""
        entries, self._entries = list(self), {}
        return entries
