"""Runs cases on both sides, and writes the table of what was found."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import kt_expert_client as kt
import pytest
from support.server import ServerProcess

from ecosystem.case import Case, Side, difference
from ecosystem.table import OLDER, TABLE, Row

# Run where these are installed: .ci/versions.sh does.
collect_ignore = [
    *([] if importlib.util.find_spec("axolotl") else ["test_axolotl.py"]),
    *([] if "DEEPSPEED_PATH" in os.environ else ["test_deepspeed.py"]),
]


@pytest.fixture(scope="session")
def table() -> Iterator[list[Row]]:
    """Rows of the cases that were run; those of earlier runs stay, so that a part can be run again."""
    rows: list[Row] = []
    yield rows
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else []
    merged = {row["case"]: row for row in before} | {row.case: asdict(row) for row in rows}
    TABLE.write_text(json.dumps([merged[name] for name in sorted(merged, key=_order)], indent=1) + "\n", encoding="utf-8")


def _order(case: str) -> tuple[int, str]:
    number = case.split(":", maxsplit=1)[0].removeprefix("T")
    return (int(number) if number.isdigit() else 999), case


@pytest.fixture
def compare(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, table: list[Row]
) -> Callable[[Case], None]:  # fmt: skip
    def run(case: Case) -> None:
        sides = []
        for name, address in (("stock", None), ("remote", server.address)):
            (tmp_path / name).mkdir()
            sides.append(Side(qwen3_checkpoint, tmp_path / name, address, case.options))
        table.append(_row(case, *sides))

    return run


def _row(case: Case, stock: Side, remote: Side) -> Row:
    name = f"{case.row}: {case.what}"
    if case.refused and not case.stock_refuses:
        with pytest.raises(kt.KtExpertError, match=case.refused) as refusal:
            case.run(remote)
        return Row(name, "refused", None, None, None, str(refusal.value))
    try:
        expected = case.run(stock)
    except (ImportError, ValueError) as error:
        is_expected = case.stock_refuses and re.search(case.refused, str(error))
        if not (is_expected or OLDER):
            raise
        with pytest.raises(type(error), match=re.escape(str(error))):
            case.run(remote)
        return Row(name, "refused", None, None, None, f"as in process: {error}")
    assert OLDER or not case.stock_refuses, "stock does not refuse this any more"
    try:
        got = case.run(remote)
    except kt.UnsupportedModel as error:
        if not OLDER:
            raise
        return Row(name, "refused", None, None, None, str(error))
    found = difference(got, expected)
    assert found.loss <= case.loss_bound, found
    assert found.norm <= case.norm_bound, found
    assert found.logit <= case.logit_bound, found
    return Row(
        name,
        "equal",
        found.loss if expected.losses else None,
        found.norm if expected.norms else None,
        found.logit if expected.logits.numel() else None,
        case.note,
    )
