"""Ranks other than 0 wait for the values that rank 0 writes, as DDP's ranks take rank 0's: rank 0 itself waits for nobody."""

from __future__ import annotations

import logging
import time

from kt_expert_client.errors import DeadlineExceeded
from kt_expert_client.run import Run

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5  # between two questions
_SILENT_S = 10.0  # then it is said what is waited for
_DEADLINE_S = 1800.0  # rank 0 may be loading a large adapter
_log = logging.getLogger("kt_expert_client")


def await_writes(run: Run, adapter: str, count: int) -> None:
    """Until rank 0 has written this often to an adapter. Raises DeadlineExceeded."""
    begun, pause, is_silent = time.monotonic(), _FIRST_PAUSE_S, True
    while (there := run.adapters.written(adapter)) < count:
        waited = time.monotonic() - begun
        about = (
            f"for rank 0 of run {run.name!r} to write adapter {adapter!r}: {there} of {count} tensors are there. Does rank 0 "
            "load the same adapters?"
        )
        if waited > _DEADLINE_S:
            raise DeadlineExceeded(f"waited {waited:.0f} s {about}")
        if is_silent and waited > _SILENT_S:
            is_silent = False
            _log.warning("waiting %s", about)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
