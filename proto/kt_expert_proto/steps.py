"""Which optimizer steps of a training are meant."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Steps:
    """From the first to before the last, counted by the optimizer steps the run had taken."""

    first: int = 0
    last: int | None = None

    @classmethod
    def parse(cls, text: str) -> Steps:
        """FIRST:LAST, either of which may be left out, or one number. Raises ValueError."""
        first, colon, last = text.partition(":")
        if not all(part.isdecimal() for part in (first, last) if part) or not (colon or first):
            raise ValueError(f"steps are {text!r}, expected FIRST:LAST as in 10:12, or one number")
        begin = int(first or 0)
        end = (int(last) if last else None) if colon else begin + 1
        if end is not None and end <= begin:
            raise ValueError(f"steps are {text!r}: the last one must come after the first")
        return cls(begin, end)

    def has(self, step: int) -> bool:
        return self.first <= step and (self.last is None or step < self.last)
