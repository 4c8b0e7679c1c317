"""How long a small pass waits for those that it could share a pass over the weights with.

Two trainers that take turns would do so for ever: when one's pass ends, the other's waits, and the first one's next request
comes a moment too late to share it. What a member asks for after a pass, and how soon, is what it asked for the last time; so
it is known who is about to come for the same layer. Waiting a part of a pass's time for them saves a reading of the weights.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from kt_expert_server.members.scheduler import Job

_SHARE_OF_PASS = 0.25  # of the time of a member's last pass: the most that others wait for its next one
_SLACK = 1.5  # times as long as the last time
_LEAST_S = 0.0005  # by which two ways to the server differ however quick they were


@dataclass(slots=True)
class _Habit:
    """What a member asked for after each kind of pass, and after how many seconds."""

    follows: dict[Hashable, tuple[Hashable, float]] = field(default_factory=dict)
    last: Hashable = None
    answered_at: float | None = None  # None: it has asked since
    last_took_s: float = 0.0


class Company:
    """Small passes that have ended, and who comes back for which."""

    def __init__(self) -> None:
        self._habits: dict[tuple[str, int], _Habit] = {}

    def ended(self, job: Job, took_s: float, now: float) -> None:
        """A member's pass over so many seconds."""
        kind = job.company
        if kind is None:
            return
        habit = self._habits.setdefault(job.member, _Habit())
        habit.last, habit.last_took_s, habit.answered_at = kind, took_s, now

    def came(self, job: Job, now: float) -> None:
        habit = self._habits.get(job.member)
        if habit is None or habit.answered_at is None:
            return
        habit.follows[habit.last] = (job.company, now - habit.answered_at)
        habit.answered_at = None

    def waits_until(self, job: Job, now: float) -> float:
        """Until when somebody may come whose pass could be computed with this one. In the past where nobody is expected."""
        kind, until = job.company, now
        if kind is None:
            return until
        for member, habit in self._habits.items():
            if habit.answered_at is None or member == job.member:
                continue
            asks, after_s = habit.follows.get(habit.last, (None, 0.0))
            most_s = _SHARE_OF_PASS * habit.last_took_s
            if asks == kind and after_s < most_s:
                until = max(until, habit.answered_at + min(most_s, _SLACK * after_s + _LEAST_S))
        return until

    def forget(self, run: str) -> None:
        for member in [each for each in self._habits if each[0] == run]:
            del self._habits[member]
