"""How long a member without a stream keeps its rank."""

from __future__ import annotations


class Lease:
    """Runs only while no stream is attached. When it is over, others need not wait for the member any more; what it holds is
    kept for a while longer, in case it was only paused."""

    def __init__(self, length_s: float, retention_s: float) -> None:
        self._length_s = length_s
        self._retention_s = retention_s
        self._since: float | None = None  # when the last stream went

    def attach(self) -> None:
        self._since = None

    def detach(self, now: float) -> None:
        if self._since is None:
            self._since = now

    def is_over(self, now: float) -> bool:
        return self._since is not None and now >= self._since + self._length_s

    def may_be_reclaimed(self, now: float) -> bool:
        """Whether what the member holds is to be given back even if nobody asks for the memory."""
        return self._since is not None and now >= self._since + self._length_s + self._retention_s

    def left_s(self, now: float) -> float | None:
        """Seconds until it is over. None while a stream is attached."""
        return None if self._since is None else max(0.0, self._since + self._length_s - now)

    @property
    def ends(self) -> float | None:
        """When it is over, if no stream comes."""
        return None if self._since is None else self._since + self._length_s

    @property
    def reclaimed_at(self) -> float | None:
        return None if self._since is None else self._since + self._length_s + self._retention_s
