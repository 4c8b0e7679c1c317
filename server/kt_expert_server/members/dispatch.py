"""The two lanes of work, engine and disk, and the actions the core has decided on."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import kt_expert_native as native

from kt_expert_server.engine.passes import PassWork
from kt_expert_server.engine.together import SharedPass
from kt_expert_server.engine.work import Outcome, Work, as_server_error
from kt_expert_server.errors import InternalError, OutOfCapacity, OverQuota, ServerError
from kt_expert_server.members.actions import Action, Note, Retire, StartDisk, StartWork
from kt_expert_server.members.company import Company
from kt_expert_server.members.scheduler import Job, Scheduler
from kt_expert_server.observe.observer import Observer

_LARGE_TICKET_BYTES = 1 << 20  # below, giving memory back is quicker than handing it to another thread
DiskDone = Callable[[object | ServerError], None]


@dataclass(slots=True)
class _Running:
    """What the engine computes: one job, or several as one."""

    jobs: list[Job]
    work: Work | SharedPass
    begun: float  # the time


class Dispatch:
    """One piece of work at a time on each lane. Actions wait here until the driver takes them."""

    def __init__(self, observer: Observer, engine: native.Engine) -> None:
        self._observer, self._engine = observer, engine
        self._company = Company()
        self._waits_until: float | None = None  # the engine, idle, for the first job's company
        self._actions: list[Action] = []
        self._scheduler = Scheduler()
        self._running: _Running | None = None
        self._disk: dict[int, DiskDone] = {}
        self._next_disk = 1
        # Set by the core: what goes on when work has failed before it ran, and what gives up memory for it, if anything can.
        self.after_failure: Callable[[], None] = lambda: None
        self.before_change: Callable[[str], None] = lambda _: None  # of a run by anything but a forward
        self.reclaim: Callable[[Job], bool] = lambda _: False
        self.explain: Callable[[OutOfCapacity, str], OutOfCapacity] = lambda error, _: error
        self.now = 0.0  # the time of the event that is being handled
        self.retired: list[native.Ticket] = []  # tickets whose memory is to be given back

    def emit(self, action: Action) -> None:
        self._actions.append(action)

    def note(self, text: str, level: int = logging.INFO) -> None:
        self.emit(Note(level, text))

    def take_actions(self) -> list[Action]:
        """All since the last call, in order."""
        self._start_next()
        if self.retired:
            large = tuple(ticket for ticket in self.retired if ticket.nbytes >= _LARGE_TICKET_BYTES)
            if large:
                self.emit(Retire(large))
            self.retired.clear()
        actions, self._actions = self._actions, []
        return actions

    @property
    def depth(self) -> int:
        """Pieces that wait for the engine or run."""
        return len(self._scheduler) + (0 if self._running is None else len(self._running.jobs))

    def next_deadline(self) -> float | None:
        """When a pass begins without those it waits for."""
        return self._waits_until if self._running is None else None

    @property
    def is_idle(self) -> bool:
        return self.depth == 0 and not self._disk

    def submit(self, job: Job) -> None:
        self._company.came(job, self.now)
        self._scheduler.add(job)

    def withdraw(self, job: Job) -> bool:
        """False where it runs already."""
        if not self._scheduler.remove(job):
            return False
        job.work.end()
        return True

    def is_at_work(self, run: str, rank: int) -> bool:
        """Whether a piece of that rank's has been begun and has not ended: what it uses is not free when it is given back."""
        running = () if self._running is None else self._running.jobs
        return any(job.member == (run, rank) for job in running) or self._scheduler.is_begun(run, rank)

    def forget_run(self, run: str) -> None:
        self._scheduler.forget(run)
        self._company.forget(run)

    def _start_next(self) -> None:
        while self._running is None:
            self._waits_until = None
            job = self._scheduler.take(self._may_begin)
            if job is None:
                return
            if not job.part and not self._begin(job):
                continue
            self._running = running = _Running([job], job.work, self.now)  # known to be at work while others are prepared
            if not job.part:
                self._add_company(running)
            self.emit(StartWork(running.work, job.part))

    def _may_begin(self, job: Job) -> bool:
        """Whether nobody is about to come who could share its pass."""
        until = self._company.waits_until(job, self.now)
        if until <= self.now:
            return True
        self._waits_until = until if self._waits_until is None else min(until, self._waits_until)
        return False

    def _add_company(self, running: _Running) -> None:
        while (other := self._scheduler.take_beside(running.jobs)) is not None:
            if self._begin(other):
                running.jobs.append(other)
        pieces = [job.work for job in running.jobs if isinstance(job.work, PassWork)]
        if len(pieces) > 1:
            running.work = SharedPass(self._engine, pieces)
            self._observer.shared(pieces[0].kind, len(pieces))

    def _begin(self, job: Job) -> bool:
        """False where it has failed before it ran."""
        if job.work.kind != "forward":
            self.before_change(job.run)
        error = self._prepare(job)
        if error is not None:
            self._end(job, error)
            self.after_failure()
            return False
        if job.begun is not None:
            job.begun()
        return True

    def _prepare(self, job: Job) -> ServerError | None:
        while True:
            try:
                job.work.prepare()
            except OutOfCapacity as error:
                job.work.held.release()  # it is prepared anew
                if isinstance(error, OverQuota) or not self.reclaim(job):
                    return self.explain(error, job.run)
            except Exception as error:  # the request's outcome all the same: an error that left here would lose the job
                return self._known(error)
            else:
                return None

    def work_done(self, error: Exception | None, fault: str) -> None:
        """The running part has ended. `fault` names an error in the log that is none of the server's own."""
        running, self._running = self._running, None
        assert running is not None  # noqa: S101
        if isinstance(running.work, SharedPass) and error is None:
            self._shared_done(running.jobs, running.work, self.now - running.begun)
            return
        for job in running.jobs:
            if error is not None:
                self._end(job, as_server_error(error) or InternalError(f"internal fault {fault}; see the server's log"))
            elif job.part + 1 < job.work.parts:
                job.part += 1
                self._scheduler.add(job)
            else:
                self._company.ended(job, self.now - running.begun, self.now)
                self._end(job, job.work.commit())

    def _shared_done(self, jobs: Sequence[Job], work: SharedPass, took_s: float) -> None:
        if work.fault is not None and as_server_error(work.fault) is None:
            self._known(work.fault)
        for job in jobs:
            self._company.ended(job, took_s, self.now)
            assert isinstance(job.work, PassWork)  # noqa: S101
            error = work.errors.get(job.work)
            self._end(job, job.work.commit() if error is None else self._known(error))

    def _known(self, error: Exception) -> ServerError:
        """The server's error for it. One that is none of its own goes to the log."""
        known = as_server_error(error)
        if known is None:
            self.note("".join(traceback.format_exception(error)), logging.ERROR)
        return known or InternalError("internal fault; see the server's log")

    def _end(self, job: Job, outcome: Outcome | ServerError) -> None:
        job.work.end()
        if isinstance(outcome, ServerError):
            self._observer.rejected(outcome.code)
        job.done(outcome)

    def on_disk(self, job: Callable[[], object], done: DiskDone) -> None:
        """`done` gets the job's result or its error."""
        job_id, self._next_disk = self._next_disk, self._next_disk + 1
        self._disk[job_id] = done
        self.emit(StartDisk(job_id, job))

    def disk_done(self, job_id: int, result: object, error: Exception | None, fault: str) -> None:
        done = self._disk.pop(job_id)
        if error is None:
            done(result)
        else:
            done(as_server_error(error) or InternalError(f"internal fault {fault}; see the server's log"))
