"""How often one identity may call: some calls at once, then so many a second. What comes faster waits for its turn.

A caller that waits for each answer is slowed down and never refused. One that does not wait is refused once its turn would be
too far away, so that what waits is bounded too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from kt_expert_server.errors import OutOfCapacity

BURST_S = 4.0  # calls of that many seconds may come at once: a trainer with many ranks, or a few that come back together
_MOST_WAIT_S = 10.0  # well below the time a client gives a server to answer


class Pace:
    """Of streams opened, control calls and refused requests, by identity; None stands for whoever failed to name one.

    The generic cell rate algorithm (ITU-T I.371): of each identity one number is kept, the time at which the calls made so far
    would have been used up at the allowed rate.
    """

    def __init__(
        self,
        per_second: float,
        on_excess: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._interval_s, self._on_excess, self._clock, self._sleep = 1.0 / per_second, on_excess, clock, sleep
        self._used_up_at: dict[str | None, float] = {}

    async def turn(self, identity: str | None) -> None:
        """Returns when it is that caller's turn. Raises OutOfCapacity where that is too far away."""
        now = self._clock()
        used_up_at = max(now, self._used_up_at.get(identity, now))
        wait_s = used_up_at + self._interval_s - BURST_S - now
        if wait_s > 0.0:
            self._on_excess()
        if wait_s > _MOST_WAIT_S:
            raise OutOfCapacity(
                f"this identity calls more than {1.0 / self._interval_s:g} times a second (--calls-per-second), and "
                f"{_MOST_WAIT_S:g} s of its calls wait; call less often",
                retry_delay_s=_MOST_WAIT_S,
            )
        self._used_up_at[identity] = used_up_at + self._interval_s
        if wait_s > 0.0:
            await self._sleep(wait_s)
