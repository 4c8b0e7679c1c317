"""When to connect again, and what makes another attempt useless."""

from __future__ import annotations

from kt_expert_client.errors import (
    AlreadyExists,
    InvalidRequest,
    KtExpertError,
    NotAuthenticated,
    NotFound,
    NotPermitted,
    OutOfCapacity,
    ServerUnavailable,
    WrongPhase,
)

_FIRST_DELAY_S = 0.05
_MAX_DELAY_S = 5.0
# What asking again does not mend. Everything else may be the network's or a restarting server's.
_FINAL = (InvalidRequest, NotFound, AlreadyExists, WrongPhase, NotPermitted, NotAuthenticated)
# A first join is not made for these either: memory that is not there, and a server that goes.
_FINAL_AT_FIRST = (*_FINAL, OutOfCapacity, ServerUnavailable)


class Attempts:
    """Further and further apart, or as far as the server says. The first join has a deadline, later ones have those of the
    calls that wait for them."""

    def __init__(self, now: float, join_timeout_s: float) -> None:
        self.at = now  # the next one
        self.last_error: KtExpertError | None = None
        self.apart_since = now
        self.has_joined = False
        self._join_deadline = now + join_timeout_s
        self._failed = 0  # since the last time it was joined

    def joined(self) -> None:
        self._failed, self.has_joined = 0, True

    def lost(self, now: float) -> None:
        """A connection that had joined is gone."""
        self._failed, self.apart_since = 0, now

    def failed(self, error: KtExpertError, now: float) -> bool:
        """Sets the time of the next attempt. False where there is to be none."""
        if self._is_final(error):
            return False
        delay = error.retry_delay_s or (min(_MAX_DELAY_S, _FIRST_DELAY_S * 2 ** min(self._failed, 20)) if self._failed else 0.0)
        self._failed += 1
        if not self.has_joined and now + delay > self._join_deadline:
            return False
        self.at, self.last_error = now + delay, error
        return True

    def _is_final(self, error: KtExpertError) -> bool:
        if not error.is_answer:
            return False  # the network's, or of a server that is not there at the moment
        if not self.has_joined:
            return isinstance(error, _FINAL_AT_FIRST) and not error.retry_delay_s
        # Its rank is somebody else's now, whatever delay the server names to newcomers.
        return isinstance(error, AlreadyExists) or (isinstance(error, _FINAL) and not error.retry_delay_s)
