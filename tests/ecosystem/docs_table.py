"""`python -m ecosystem.docs_table`, in tests/: puts the table that the last test run wrote into docs/trainers.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import transformers

from ecosystem.table import TABLE

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "trainers.md"
_TABLE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)
_VERSIONS = re.compile(r"with transformers [\w.]+ and PEFT [\w.]+\.\n")


def rows_of_page() -> dict[str, str]:
    """Outcome by case, as the page has it."""
    found = _TABLE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None
    lines = [line.strip("| ").split(" | ") for line in found[0].splitlines()[2:]]
    return {cells[0]: cells[1] for cells in lines}


def main() -> None:
    lines = ["| case | outcome | loss | norm | logits | |", "|---|---|---|---|---|---|"]
    for row in json.loads(TABLE.read_text(encoding="utf-8")):
        differences = [row["loss_diff"], row["norm_diff"], row["logit_diff"]]
        shown = ["" if value is None else f"{value:.1e}" for value in differences]
        reason = " ".join(row["reason"].replace("|", "\\|").split())
        lines.append(f"| {' | '.join([row['case'], row['outcome'], *shown, reason])} |")
    text = _TABLE.sub(lambda _: "\n".join(lines) + "\n", PAGE.read_text(encoding="utf-8"))
    versions = f"with transformers {transformers.__version__} and PEFT {peft.__version__}.\n"
    PAGE.write_text(_VERSIONS.sub(versions, text), encoding="utf-8")


if __name__ == "__main__":
    main()
