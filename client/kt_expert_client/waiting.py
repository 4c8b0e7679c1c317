"""Waits for what other ranks do: each says what it is for once it takes long, and has an end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from kt_expert_client.errors import DeadlineExceeded

SILENT_S = 10.0  # then a wait says what it is for
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5  # between two questions
_DEADLINE_S = 1800.0  # ranks may differ by a whole gradient accumulation, or one may be loading a large adapter
_log = logging.getLogger(__name__)


def wait_until(is_so: Callable[[], bool], about: Callable[[], str]) -> None:
    """Asks again and again. `about`, as in "for rank 0 to ...", is said after SILENT_S. Raises DeadlineExceeded."""
    begun, pause, is_silent = time.monotonic(), _FIRST_PAUSE_S, True
    while not is_so():
        waited = time.monotonic() - begun
        if waited > _DEADLINE_S:
            raise DeadlineExceeded(f"waited {waited:.0f} s {about()}")
        if is_silent and waited > SILENT_S:
            is_silent = False
            _log.warning("waiting %s", about())
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
