"""Names of automatic checkpoints."""

from __future__ import annotations

import hashlib

_KEPT_OF_RUN = 80  # letters of the run's name, so that the whole stays a name (names.py)
_DIGEST_LETTERS = 12


def automatic_name(run: str, sequence: int) -> str:
    """Starts with the run's name where that is short; runs whose names start alike differ in the digest."""
    return f"{_prefix(run)}{sequence:08d}"


def is_automatic_name(run: str, name: str) -> bool:
    """Whether an automatic checkpoint of that run has that name."""
    return name.startswith(_prefix(run))


def _prefix(run: str) -> str:
    digest = hashlib.sha256(run.encode()).hexdigest()[:_DIGEST_LETTERS]
    return f"{run[:_KEPT_OF_RUN]}.auto-{digest}-"
