"""Which piece of work the engine does next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from kt_expert_server.engine.work import Outcome, Work
from kt_expert_server.errors import ServerError

# Of passes that share one over the weights. A batch of more is bound by its products and not by reading weights: it gains
# nothing, and the others would wait for it.
SHARED_TOKENS_EACH = 64
SHARED_TOKENS = 256


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
    part: int = 0  # of its work, which comes next

    @property
    def member(self) -> tuple[str, int]:
        return self.run, self.rank

    @property
    def company(self) -> Hashable | None:
        """What it has in common with those that it may share a pass with. None: it is computed alone."""
        return self.work.company() if self.work.tokens <= SHARED_TOKENS_EACH else None


class Scheduler:
    """The run that has had least of the engine comes first; in it a backward, which frees memory, then the rank that has had
    least, then whoever came first.

    A run that was idle does not save up: it begins at the least that any waiting run has had. A piece that has been begun comes
    back after each part; others of its run wait until it has ended. Small passes over the same layer are taken together.
    """

    def __init__(self) -> None:
        self._waiting: list[Job] = []
        self._by_run: dict[str, float] = {}
        self._by_rank: dict[tuple[str, int], float] = {}
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: Job) -> None:
        if not job.part:
            self._count += 1
            job.order = self._count
        if all(other.run != job.run for other in self._waiting):
            active = [self._by_run.get(other.run, 0.0) for other in self._waiting]
            self._by_run[job.run] = max(self._by_run.get(job.run, 0.0), min(active, default=0.0))
        self._waiting.append(job)

    def remove(self, job: Job) -> bool:
        """False where it has been begun."""
        if job not in self._waiting or job.part:
            return False
        self._waiting.remove(job)
        return True

    def take(self, may_begin: Callable[[Job], bool] = lambda _: True) -> Job | None:
        """The next one that may begin. What its member has to come later does not overtake one that may not."""
        held = set()
        for job in sorted(self._possible(), key=self._key):
            if job.member in held:
                continue
            if may_begin(job):
                return self._take(job)
            held.add(job.member)
        return None

    def take_beside(self, taken: Sequence[Job]) -> Job | None:
        """One that may share a pass over the weights with those: another member's next one, of the same kind and layer."""
        company, tokens = taken[0].company, sum(job.work.tokens for job in taken)
        if company is None:
            return None
        passed = {job.member for job in taken}
        for job in sorted(self._possible(), key=self._key):
            if job.member in passed:
                continue
            passed.add(job.member)  # what a member has to come later does not overtake
            if job.company == company and tokens + job.work.tokens <= SHARED_TOKENS:
                return self._take(job)
        return None

    def _possible(self) -> list[Job]:
        begun = {job.run: job for job in self._waiting if job.part}
        return [job for job in self._waiting if begun.get(job.run, job) is job]

    def _take(self, job: Job) -> Job:
        self._waiting.remove(job)
        self._by_run[job.run] = self._by_run.get(job.run, 0.0) + job.work.cost
        self._by_rank[job.member] = self._by_rank.get(job.member, 0.0) + job.work.cost
        return job

    def is_begun(self, run: str, rank: int) -> bool:
        """Whether a piece of that rank's waits for its next part."""
        return any(job.part and job.member == (run, rank) for job in self._waiting)

    def _key(self, job: Job) -> tuple[bool, float, bool, float, int]:
        had, by_rank = self._by_run.get(job.run, 0.0), self._by_rank.get(job.member, 0.0)
        return not job.is_urgent, had, job.work.kind != "backward", by_rank, job.order

    def forget(self, run: str) -> None:
        """The run is closed. A last copy of it may still wait."""
        self._by_run.pop(run, None)
        for key in [each for each in self._by_rank if each[0] == run]:
            del self._by_rank[key]
