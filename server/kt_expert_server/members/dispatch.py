"""The two lanes of work, engine and disk, and the actions the core has decided on."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

import kt_expert_native as native

from kt_expert_server.engine.work import Outcome, as_server_error
from kt_expert_server.errors import InternalError, OutOfCapacity, OverQuota, ServerError
from kt_expert_server.members.actions import Action, Note, Retire, StartDisk, StartWork
from kt_expert_server.members.scheduler import Job, Scheduler
from kt_expert_server.observe.observer import Observer

_LARGE_TICKET_BYTES = 1 << 20  # below, giving memory back is quicker than handing it to another thread
DiskDone = Callable[[object | ServerError], None]


class Dispatch:
    """One piece of work at a time on each lane. Actions wait here until the driver takes them."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._actions: list[Action] = []
        self._scheduler = Scheduler()
        self._running: Job | None = None
        self._disk: dict[int, DiskDone] = {}
        self._next_disk = 1
        # Set by the core: what goes on when work has failed before it ran, and what gives up memory for it, if anything can.
        self.after_failure: Callable[[], None] = lambda: None
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
        return len(self._scheduler) + (self._running is not None)

    @property
    def is_idle(self) -> bool:
        return self.depth == 0 and not self._disk

    def submit(self, job: Job) -> None:
        self._scheduler.add(job)

    def withdraw(self, job: Job) -> bool:
        """False where it runs already."""
        if not self._scheduler.remove(job):
            return False
        job.work.end()
        return True

    def is_at_work(self, run: str, rank: int) -> bool:
        """Whether a piece of that rank's has been begun and has not ended: what it uses is not free when it is given back."""
        running = self._running
        return (running is not None and (running.run, running.rank) == (run, rank)) or self._scheduler.is_begun(run, rank)

    def forget_run(self, run: str) -> None:
        self._scheduler.forget(run)

    def _start_next(self) -> None:
        while self._running is None and (job := self._scheduler.take()) is not None:
            if not job.part and not self._begin(job):
                continue
            self._running = job
            self.emit(StartWork(job.work, job.part))

    def _begin(self, job: Job) -> bool:
        """False where it has failed before it ran."""
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
                known = as_server_error(error)
                if known is None:
                    self.note("".join(traceback.format_exception(error)), logging.ERROR)
                return known or InternalError("internal fault; see the server's log")
            else:
                return None

    def work_done(self, error: Exception | None, fault: str) -> None:
        """The running part has ended. `fault` names an error in the log that is none of the server's own."""
        job, self._running = self._running, None
        assert job is not None  # noqa: S101
        if error is None and job.part + 1 < job.work.parts:
            job.part += 1
            self._scheduler.add(job)
        elif error is None:
            self._end(job, job.work.commit())
        else:
            self._end(job, as_server_error(error) or InternalError(f"internal fault {fault}; see the server's log"))

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
