"""Connections that delay, lose, repeat, damage and cut what travels on them, and ends that are not heard of for a while."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from simulation.heap import EventHeap
from simulation.shared import Shared

KEEPALIVE_S = 50.0  # until a peer that does not answer any more is given up: keepalive time and time-out


class End(Protocol):
    """Who holds one end of a connection. Called in the order of the wire."""

    def on_message(self, message: bytes) -> None: ...

    def on_end(self, reason: str) -> None:
        """Nothing follows."""


@dataclass(frozen=True)
class Faults:
    """Per message, unless said otherwise."""

    latency_s: float = 0.002
    cut: float = 0.0
    lose: float = 0.0  # this message and all that follow, without a word: only keepalive finds out
    repeat: float = 0.0
    damage: float = 0.0
    truncate: float = 0.0
    stall: float = 0.0  # this message and all that follow come much later, perhaps after their sender has given up
    refuse: float = 0.0  # per connection


class Connection:
    """Two directed queues. Side 0 is the trainer's, side 1 the server's."""

    def __init__(
        self, heap: EventHeap, rng: random.Random, faults: Callable[[], Faults], ends: tuple[End, End],
        shared: Shared | None = None, *, is_socket: bool = False,
    ) -> None:  # fmt: skip
        """`shared`: memory of both ends, who are on one host then. Nothing is lost, repeated or damaged between them.
        `is_socket`: a bare one, whose bytes come in order or not at all, and in any bites."""
        self._heap, self._rng, self.shared = heap, rng, shared
        self.bites_rng = random.Random(rng.getrandbits(64)) if is_socket or shared is not None else None
        if shared is not None:
            self._faults = lambda: replace(faults(), lose=0.0, repeat=0.0, damage=0.0, truncate=0.0)
        else:
            self._faults = (lambda: replace(faults(), repeat=0.0, truncate=0.0)) if is_socket else faults
        self._ends = ends
        self._arrives = [0.0, 0.0]  # when the last message of each direction does: messages keep their order
        self._heard = [False, False]  # which side knows of the end
        self._silent = [False, False]  # which direction loses everything
        self.is_open = True

    def send(self, side: int, message: bytes) -> None:
        """From that side to the other."""
        if self._heard[side] or self._silent[side] or (self.shared is not None and not self.is_open):
            return  # a socket of one host that was cut takes nothing more
        faults, rng = self._faults(), self._rng
        if rng.random() < faults.lose:
            self._silent[side] = True
            self._heap.after(KEEPALIVE_S, lambda: self.cut("keepalive"))
            return
        if rng.random() < faults.stall and self._stall(side, message):
            return
        if rng.random() < faults.cut:
            self.cut("cut")
            return
        copies = 2 if rng.random() < faults.repeat else 1
        if rng.random() < faults.damage:
            at = rng.randrange(len(message))
            message = message[:at] + bytes([message[at] ^ (1 << rng.randrange(8))]) + message[at + 1 :]
        if rng.random() < faults.truncate:
            message = message[: rng.randrange(len(message))]
        for _ in range(copies):
            self._deliver(1 - side, message)

    def close(self, side: int, reason: str) -> None:
        """That side ends it in good order: what was sent before arrives, then the end."""
        if self._heard[side]:
            return
        self._heard[side] = True
        self._end_at(1 - side, self._next_arrival(1 - side), reason)

    def cut(self, reason: str) -> None:
        """The network ends it: each side hears of it in its own time, and what is under way may still arrive."""
        if not self.is_open:
            return
        self.is_open = False
        for side in (0, 1):
            late = self._rng.choice((0.0, 0.0, 0.01, 1.0, KEEPALIVE_S))
            self._end_at(side, self._heap.now + late, reason)

    def _stall(self, side: int, message: bytes) -> bool:
        """True where the sender is told that the connection has ended, and the other side only when all has arrived."""
        # Not before what is late already: messages keep their order.
        self._arrives[1 - side] = max(self._arrives[1 - side], self._heap.now + self._rng.choice((0.1, 2.0, 30.0)))
        if self._rng.random() < 0.5:
            return False
        self._deliver(1 - side, message)
        self._end_at(side, self._heap.now, "stalled")
        self._end_at(1 - side, self._arrives[1 - side] + 1.0, "stalled")
        return True

    def _deliver(self, side: int, message: bytes) -> None:
        def arrive() -> None:
            if not self._heard[side]:
                self._ends[side].on_message(message)

        self._heap.at(self._next_arrival(side), arrive)

    def _next_arrival(self, side: int) -> float:
        latency = self._faults().latency_s * (0.2 + self._rng.random())
        self._arrives[side] = max(self._arrives[side], self._heap.now + latency)
        return self._arrives[side]

    def _end_at(self, side: int, time: float, reason: str) -> None:
        def end() -> None:
            self.is_open = False
            if not self._heard[side]:
                self._heard[side] = True
                self._ends[side].on_end(reason)

        self._heap.at(time, end)
