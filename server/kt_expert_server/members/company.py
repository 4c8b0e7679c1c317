"""How long a small pass waits for those that it could share a pass over the weights with.

Trainers whose passes were computed together get their results at the same time, and their next requests come within a moment
of each other. Were the first of them begun at once, the others would have to wait for it, and none would share the next one
either.
"""

from __future__ import annotations

from collections.abc import Sequence

from kt_expert_server.members.scheduler import Job

_SHARE_OF_PASS = 0.25  # of the time that the last shared pass took
_MOST_S = 0.003  # what two trainers' ways to the server differ by on a busy host


class Company:
    """Members whose last passes were one, until the next piece begins. Nothing waits while others have work for the engine, and
    only once for each shared pass."""

    def __init__(self) -> None:
        self._members: frozenset[tuple[str, int]] = frozenset()
        self._most_s = 0.0
        self.waits_until: float | None = None  # from when the first of them has come

    def shared(self, jobs: Sequence[Job], took_s: float) -> None:
        """A pass of several has ended."""
        self._members = frozenset(job.member for job in jobs)
        self._most_s, self.waits_until = min(_MOST_S, _SHARE_OF_PASS * took_s), None

    def came(self, job: Job, now: float) -> None:
        if self.waits_until is None and job.member in self._members:
            self.waits_until = now + self._most_s

    def begins(self) -> None:
        """A piece, whosever."""
        self._members, self.waits_until = frozenset(), None

    def is_awaited(self, waiting: Sequence[Job], now: float) -> bool:
        """Whether the engine stays idle a moment although those wait."""
        if self.waits_until is None or now >= self.waits_until or not waiting:
            return False
        company = waiting[0].work.company()
        if company is None or any(job.work.company() != company for job in waiting):
            return False
        return {job.member for job in waiting} < self._members
