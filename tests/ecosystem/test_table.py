"""The table in docs/trainers.md has every case, with its outcome."""

from __future__ import annotations

from ecosystem import adapters, docs_table, extra_experts, loops, passes, trainers, trl_trainers


def test_the_page_has_every_case() -> None:
    cases = [*adapters.CASES, *extra_experts.CASES, *loops.CASES, *passes.CASES, *trainers.CASES, *trl_trainers.CASES]
    expected = {f"{case.row}: {case.what}": "refused" if case.refused else "equal" for case in cases}
    assert len(expected) == len(cases), "two cases have one name"
    shown = docs_table.rows_of_page()
    assert {name: shown.get(name) for name in expected} == expected
