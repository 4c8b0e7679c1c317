"""Virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class EventHeap:
    """Runs actions in the order of their times; those of one time in the order they were given."""

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0
        self._events: list[tuple[float, int, Action]] = []

    def at(self, time: float, action: Action) -> None:
        self.count += 1
        heapq.heappush(self._events, (max(time, self.now), self.count, action))

    def after(self, delay: float, action: Action) -> None:
        self.at(self.now + delay, action)

    @property
    def next_time(self) -> float:
        return self._events[0][0] if self._events else float("inf")

    def step(self) -> bool:
        """One event. False where there is none left."""
        if not self._events:
            return False
        self.now, _, action = heapq.heappop(self._events)
        action()
        return True
