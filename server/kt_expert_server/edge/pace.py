"""How often a caller may call: some calls at once, then so many a second. What comes faster waits for its turn.

A caller that waits for each answer is slowed down. One that does not is refused once its turn would be too far away, so that
what waits is bounded too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from kt_expert_server.errors import OutOfCapacity

BURST_S = 4.0  # calls of that many seconds may come at once: those of a few trainers that begin together
MOST_WAIT_S = 10.0  # well below the time a client gives a server to answer
_MOST_CALLERS = 4096  # that are remembered; whoever has not called for a while is forgotten
STRANGERS = None  # the caller for all who show no valid token, or no valid message


class Pace:
    """Of streams opened, control calls and refused requests, by caller.

    The generic cell rate algorithm (ITU-T I.371): of each caller one number is kept, the time at which the calls made so far
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
        self._burst_s = max(BURST_S, self._interval_s)  # the first call is free at any rate
        self._used_up_at: dict[str | None, float] = {}

    async def turn(self, caller: str | None) -> None:
        """Returns when it is that caller's turn. Raises OutOfCapacity where that is too far away."""
        if self._wait_s(caller, self._interval_s) > MOST_WAIT_S:
            self._on_excess()
            whose = "from callers without a valid token or message" if caller is STRANGERS else "from this caller"
            raise OutOfCapacity(
                f"more than {1.0 / self._interval_s:g} calls a second come {whose} (--calls-per-second), and {MOST_WAIT_S:g} s "
                "of them wait; call less often",
                retry_delay_s=MOST_WAIT_S,
            )
        self.charge(caller)
        await self.settle(caller)

    def charge(self, caller: str | None) -> None:
        """Counts a call that has been made already. However many there are, they are used up within MOST_WAIT_S."""
        now = self._clock()
        used_up_at = max(now, self._used_up_at.get(caller, now)) + self._interval_s
        if len(self._used_up_at) >= _MOST_CALLERS:
            self._used_up_at = {each: at for each, at in self._used_up_at.items() if at > now}
        self._used_up_at[caller] = min(used_up_at, now + self._burst_s + MOST_WAIT_S)

    async def settle(self, caller: str | None) -> None:
        """Returns when the calls made so far are within the pace."""
        wait_s = self._wait_s(caller)
        if wait_s > 0.0:
            self._on_excess()
            await self._sleep(wait_s)

    def _wait_s(self, caller: str | None, more_s: float = 0.0) -> float:
        """Until the calls made so far, and one more that takes `more_s`, are within the pace."""
        now = self._clock()
        return max(0.0, max(now, self._used_up_at.get(caller, now)) + more_s - self._burst_s - now)
