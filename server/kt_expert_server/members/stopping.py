"""The stages of a server's end: what was accepted is finished, what has no checkpoint is saved, outcomes leave."""

from __future__ import annotations

import enum
import logging
from typing import Protocol

from kt_expert_server.errors import ServerError, ServerUnavailable

_LAST_CHECKPOINT_S = 30.0  # for the last checkpoints, also where the work before them took all the time there was
_RESTART_S = 1.0  # before another server can be there


class Stopped(Protocol):
    """What the stages need of the core."""

    @property
    def is_idle(self) -> bool: ...
    @property
    def has_unacknowledged(self) -> bool: ...
    def cancel_all(self) -> None: ...
    def checkpoint_all(self) -> None: ...
    def end_all(self, error: ServerError) -> None: ...
    def warn(self, text: str, level: int) -> None: ...


class _Stage(enum.Enum):
    FINISHING = enum.auto()
    SAVING = enum.auto()
    LEAVING = enum.auto()
    OVER = enum.auto()


class Stopping:
    """Begins when it is made. Times in seconds."""

    def __init__(self, core: Stopped, now: float, timeout_s: float) -> None:
        self._core = core
        self._stage = _Stage.FINISHING
        self._timeout_s = timeout_s
        self._deadline = now + timeout_s
        self._saved_by = 0.0

    @property
    def is_over(self) -> bool:
        """Every member has had its last word."""
        return self._stage is _Stage.OVER

    def next_deadline(self) -> float | None:
        if self._stage is _Stage.OVER:
            return None
        return self._saved_by if self._stage is _Stage.SAVING else self._deadline

    def advance(self, now: float) -> None:
        """Goes on as far as it can: to be called after every event."""
        core = self._core
        if self._stage is _Stage.FINISHING and (core.is_idle or now >= self._deadline):
            if not core.is_idle:
                core.warn(f"requests were still running after {self._timeout_s:g} s and are abandoned", logging.WARNING)
                core.cancel_all()
            core.checkpoint_all()
            self._stage, self._saved_by = _Stage.SAVING, max(self._deadline, now + _LAST_CHECKPOINT_S)
        if self._stage is _Stage.SAVING and (core.is_idle or now >= self._saved_by):
            self._stage = _Stage.LEAVING
        if self._stage is _Stage.LEAVING and (not core.has_unacknowledged or now >= self._deadline):
            self._stage = _Stage.OVER
            core.end_all(stopping())


def stopping() -> ServerUnavailable:
    """For members and for those who come; another server may take its place."""
    return ServerUnavailable("the server has finished its work and is stopping", retry_delay_s=_RESTART_S)
