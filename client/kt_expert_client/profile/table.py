"""The account at the end of a training: where the time of its calls went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from kt_expert_client.profile.times import PARTS, CallTimes, Parts, share_of

_MS_PER_S = 1000.0
_WIDTH = 10  # of a column of figures
_TITLES = {"hand_over": "hand over", "whole": "in all"}


@dataclass(slots=True)
class _Sum:
    calls: int = 0
    together: int = 0  # calls whose pass was shared with others'
    parts: Parts = field(default_factory=Parts)
    stages_s: Counter[str] = field(default_factory=Counter)


class Summary:
    """A listener that adds up."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sum] = {}
        self._first: float | None = None
        self._last = 0.0

    def __call__(self, times: CallTimes) -> None:
        found = self._sums.setdefault(times.op, _Sum())
        found.calls += 1
        found.together += times.server.together > 1
        found.parts += times.parts
        found.stages_s.update(times.server.stages_s)
        self._first = times.stamps.asked if self._first is None else min(self._first, times.stamps.asked)
        self._last = max(self._last, times.taken)

    def text(self) -> str:
        """A table of milliseconds a call, and what else is worth knowing. Empty where nothing was measured."""
        if self._first is None:
            return ""
        names = [_TITLES.get(name, name) for name in PARTS]
        lines = ["ms a call", f"{'':10}{'calls':>{_WIDTH}}" + "".join(f"{name:>{_WIDTH}}" for name in names)]
        for op, found in sorted(self._sums.items(), reverse=True):
            means = [getattr(found.parts, name) / found.calls * _MS_PER_S for name in PARTS]
            lines.append(f"{op:10}{found.calls:>{_WIDTH}}" + "".join(f"{mean:>{_WIDTH}.2f}" for mean in means))
        for op, found in sorted(self._sums.items(), reverse=True):
            shares = ", ".join(f"{name} {share:.0%}" for name, share in share_of(found.stages_s).items() if share >= 0.005)
            lines.append(f"the engine, {op}: {shares}")
        lines.append(self._waiting())
        return "\n".join(lines)

    def _waiting(self) -> str:
        assert self._first is not None  # noqa: S101  # text() has looked
        lasted = max(self._last - self._first, 1e-9)
        waited = sum(found.parts.waited for found in self._sums.values())
        together = sum(found.together for found in self._sums.values()) / sum(found.calls for found in self._sums.values())
        shared = f"; {together:.0%} of the calls shared a pass with others'" if together else ""
        return f"the trainer waited {waited:.2f} s of the {lasted:.2f} s from its first call to its last result{shared}"
