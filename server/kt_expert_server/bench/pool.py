"""What the engine's threads cost a loop, and what they gain it: on this machine's cores, and as many as a big host has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kt_expert_native as native
from rich.console import Console
from rich.table import Table

from kt_expert_server.bench.plots import figure_for

THREADS = (1, 2, 4, 8, 16, 32, 64, 128)
_LOOPS = 2000
_LONG_LOOPS = 100
_TASK_S = 100e-6  # a block of a small batch's product
_TASKS_PER_THREAD = 4
_US_PER_S = 1e6


@dataclass(frozen=True, slots=True)
class PoolRow:
    """Median seconds of a loop of empty tasks, and of one whose tasks take a while, over what they would take at best."""

    threads: int
    two_tasks_s: float
    each_task_s: float  # as many tasks as threads
    busy_ratio: float


def measure_pool(cores: int, threads: Sequence[int] = THREADS) -> list[PoolRow]:
    rows = []
    for count in threads:
        tasks = _TASKS_PER_THREAD * count
        best = tasks * _TASK_S / min(count, cores)
        busy = native.measure_loops(count, tasks, _TASK_S, _LONG_LOOPS)
        two, each = (native.measure_loops(count, number, 0.0, _LOOPS) for number in (2, count))
        rows.append(PoolRow(count, two, each, busy / best))
    return rows


def pool_as_json(rows: Sequence[PoolRow]) -> dict[str, Any]:
    """Microseconds and ratios, by the number of threads."""
    return {
        "two_tasks_us": {str(row.threads): row.two_tasks_s * _US_PER_S for row in rows},
        "a_task_each_us": {str(row.threads): row.each_task_s * _US_PER_S for row in rows},
        "busy_ratio": {str(row.threads): row.busy_ratio for row in rows},
    }


def print_pool(console: Console, rows: Sequence[PoolRow], cores: int) -> None:
    table = Table(title=f"a loop of the engine's threads on {cores} cores", title_justify="left")
    for name in ("threads", "2 empty tasks, us", "an empty task each, us", f"{_TASK_S * _US_PER_S:g} us tasks, over the best"):
        table.add_column(name, justify="right")
    for row in rows:
        times = f"{row.two_tasks_s * _US_PER_S:.2f}", f"{row.each_task_s * _US_PER_S:.2f}"
        table.add_row(str(row.threads), *times, f"{row.busy_ratio:.2f}")
    console.print(table)


def plot_pool(rows: Sequence[PoolRow], path: Path) -> None:
    """Microseconds of a loop over the number of threads. Needs matplotlib."""
    with figure_for(path) as axis:
        threads = [row.threads for row in rows]
        axis.plot(threads, [row.two_tasks_s * _US_PER_S for row in rows], marker="o", label="2 empty tasks")
        axis.plot(threads, [row.each_task_s * _US_PER_S for row in rows], marker="o", label="an empty task each")
        axis.set_xscale("log", base=2)
        axis.set_xlabel("threads")
        axis.set_ylabel("us a loop")
