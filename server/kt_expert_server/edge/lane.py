"""The engine's thread."""

from __future__ import annotations

import queue
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress

Job = Callable[[], None]
Done = Callable[[BaseException | None], None]


class EngineLane:
    """Runs one job after another, and calls back on the event loop. An executor's futures would take longer than a small job's
    way from one thread to the other."""

    def __init__(self, loop: AbstractEventLoop, gate: AbstractContextManager[object]) -> None:
        """A job runs inside the gate."""
        self._loop, self._gate = loop, gate
        self._jobs: queue.SimpleQueue[tuple[Job, Done] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None  # from the first job on: what never begins has nothing to end

    def submit(self, job: Job, done: Done) -> None:
        """`done` gets the job's error, or None."""
        self._jobs.put((job, done))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kt-engine")
            self._thread.start()

    def close(self) -> None:
        """The thread ends when the job that it has, if any, has ended. What waits is not begun."""
        while not self._jobs.empty():
            self._jobs.get()
        self._jobs.put(None)

    def _run(self) -> None:
        while (taken := self._jobs.get()) is not None:
            job, done = taken
            error: BaseException | None = None
            try:
                with self._gate:
                    job()
            except BaseException as raised:  # the event loop's thread decides what it means
                error = raised
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits for it
                self._loop.call_soon_threadsafe(done, error)
            del taken, job, done, error  # what a job holds is not kept until the next one comes
