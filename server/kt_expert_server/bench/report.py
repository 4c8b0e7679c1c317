"""A report on the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kt_expert_server.bench.kernels import PASSES, Report, Row
from kt_expert_server.bench.plots import pyplot

_MEBI = 1024**2


def print_rows(console: Console, rows: Sequence[Row], *, peers: Sequence[str]) -> None:
    """One table a batch size."""
    table = Table(title=f"{rows[0].tokens} tokens", title_justify="left")
    for name in ("pass", "format", "rank", "ms", "GFLOP/s", "of bound", "over rank 0", "extra MiB", "error", *peers):
        table.add_column(name, justify="left" if name in ("pass", "format") else "right")
    for row in rows:
        overhead = "" if row.lora_overhead is None else f"{row.lora_overhead:+.1%}"
        versus = (f"{row.versus[peer]:.2f}x" if peer in row.versus else "" for peer in peers)
        table.add_row(
            row.direction,
            row.format,
            str(row.rank),
            f"{row.seconds * 1e3:.2f}",
            f"{row.gflops:.1f}",
            f"{row.bound_fraction:.2f}",
            overhead,
            f"{row.extra_bytes / _MEBI:.0f}",
            "" if row.weight_error is None else f"{row.weight_error:.2%}",
            *versus,
        )
    console.print(table)


def write_plot(report: Report, path: Path) -> None:
    """GFLOP/s over the batch size, a line per pass, format and rank, below what bounds bf16. Needs matplotlib."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(PASSES), figsize=(11, 4.5), sharey=True, layout="constrained")
    for axis, direction in zip(axes, PASSES, strict=True):
        rows = [row for row in report.rows if row.direction == direction]
        for weight_format, rank in sorted({(row.format, row.rank) for row in rows}):
            line = sorted((row.tokens, row.gflops) for row in rows if (row.format, row.rank) == (weight_format, rank))
            axis.plot(*zip(*line, strict=True), marker="o", label=f"{weight_format}, rank {rank}")
        bound = sorted({(row.tokens, row.gflops / row.bound_fraction) for row in rows if row.format == rows[0].format})
        axis.plot(*zip(*bound, strict=True), color="black", linestyle="--", label=f"bound of {rows[0].format}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(direction)
        axis.set_xlabel("tokens")
        axis.grid(visible=True, which="both", alpha=0.3)
    axes[0].set_ylabel("GFLOP/s")
    axes[0].legend(fontsize="small")
    shape = report.shape
    figure.suptitle(
        f"{shape.name}: E={shape.experts} H={shape.hidden} I={shape.intermediate} k={shape.top_k}, "
        f"{', '.join(dict.fromkeys(report.kernels.values()))} on {report.threads} threads"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
