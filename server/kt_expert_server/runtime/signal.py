"""Waiting for a condition that other coroutines make true."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Signal:
    """notify() wakes all waiters, who look at their condition again. Used from the event loop only."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Raises TimeoutError where the condition did not become true in time, and whatever the condition raises."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiters.add(waiter)
                try:
                    await waiter
                finally:
                    self._waiters.discard(waiter)
