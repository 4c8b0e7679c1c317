"""Which piece of work the engine does next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kt_expert_server.engine.work import Outcome, Work
from kt_expert_server.errors import ServerError


@dataclass(eq=False, slots=True)
class Job:
    """A piece of work, for whom it is, and what to do with its outcome. `done` gets an Outcome or an error."""

    work: Work
    run: str
    rank: int
    done: Callable[[Outcome | ServerError], None]
    begun: Callable[[], None] | None = None  # called when the engine takes it
    is_urgent: bool = False  # before all others: what it is about must not change first
    order: int = 0


class Scheduler:
    """The run that has had least of the engine comes first, in it the rank that has, then whoever came first.

    A run that was idle does not save up: it begins at the least that any waiting run has had.
    """

    def __init__(self) -> None:
        self._waiting: list[Job] = []
        self._by_run: dict[str, float] = {}
        self._by_rank: dict[tuple[str, int], float] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        self._count += 1
        job.order = self._count
        if all(other.run != job.run for other in self._waiting):
            active = [self._by_run.get(other.run, 0.0) for other in self._waiting]
            self._by_run[job.run] = max(self._by_run.get(job.run, 0.0), min(active, default=0.0))
        self._waiting.append(job)

    def remove(self, job: Job) -> bool:
        """False where it is not waiting any more."""
        if job not in self._waiting:
            return False
        self._waiting.remove(job)
        return True

    def take(self) -> Job | None:
        if not self._waiting:
            return None
        job = min(self._waiting, key=self._key)
        self._waiting.remove(job)
        self._by_run[job.run] = self._by_run.get(job.run, 0.0) + job.work.cost
        self._by_rank[job.run, job.rank] = self._by_rank.get((job.run, job.rank), 0.0) + job.work.cost
        return job

    def _key(self, job: Job) -> tuple[bool, float, float, int]:
        had, by_rank = self._by_run.get(job.run, 0.0), self._by_rank.get((job.run, job.rank), 0.0)
        return not job.is_urgent, had, by_rank, job.order

    def forget(self, run: str) -> None:
        """The run is closed. A last copy of it may still wait."""
        self._by_run.pop(run, None)
        for key in [each for each in self._by_rank if each[0] == run]:
            del self._by_rank[key]
