"""What `kt-expert bench pool` measures."""

from __future__ import annotations

from pathlib import Path

import kt_expert_native as native
import pytest
from kt_expert_server.bench.pool import measure_pool, plot_pool, pool_as_json, print_pool
from rich.console import Console


def test_a_row_for_each_number_of_threads(tmp_path: Path) -> None:
    rows = measure_pool(2, threads=(1, 3))
    assert [row.threads for row in rows] == [1, 3]
    assert all(row.two_tasks_s > 0.0 and row.each_task_s > 0.0 for row in rows)
    # On more cores than there are, no loop could be quicker than its tasks.
    assert rows[0].busy_ratio >= 1.0
    report = pool_as_json(rows)
    assert report.keys() == {"two_tasks_us", "a_task_each_us", "busy_ratio"}
    console = Console(record=True, width=140)
    print_pool(console, rows, 2)
    assert "empty task each" in console.export_text()
    plot_pool(rows, tmp_path / "pool.svg")
    assert (tmp_path / "pool.svg").stat().st_size > 0


@pytest.mark.parametrize("bad", [{"threads": 0}, {"tasks": 0}, {"loops": 0}, {"task_s": -1.0}, {"task_s": float("nan")}])
def test_what_cannot_be_measured_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(native.InvalidArgument):
        native.measure_loops(**({"threads": 1, "tasks": 1, "task_s": 0.0, "loops": 1} | bad))
