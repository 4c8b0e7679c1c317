"""The table of what was found: its rows, and where a test run writes it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import transformers

# Set where older transformers and PEFT are installed, which refuse some of what today's do: then the server's side must refuse
# it in the same words.
OLDER = "OLDER_LIBRARIES" in os.environ
_NAME = f"trainers-transformers-{transformers.__version__}.json" if OLDER else "trainers.json"
TABLE = Path(__file__).resolve().parents[2] / "build" / "ecosystem" / _NAME


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. A difference is null where nothing of its kind is compared."""

    case: str
    outcome: str  # equal or refused
    loss_diff: float | None
    norm_diff: float | None
    logit_diff: float | None
    reason: str
