"""Memory of this process after loading one layer and running it, beside what the contract allows."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import kt_expert_native as native
from rich.console import Console
from rich.table import Table

from kt_expert_server.bench.layer import LayerBench, make_batch
from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.model.memory_plan import RUNTIME_BYTES, format_bytes
from kt_expert_server.model.placement import Placement

WEIGHT_FACTOR = 1.05
_KIB = 1024


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Resident sizes in bytes; `allowed` is 1.05 times the weights and 300 MiB."""

    format: str
    tokens: int
    rank: int
    weights: int
    adapter: int
    after_load: int
    peak: int
    allowed: int


def measure_memory(
    engine: native.Engine, shape: LayerShape, weight_format: str, tokens: int, rank: int, placement: Placement
) -> MemoryRow:
    """One forward and backward. The peak is the process's own since it began, so one format a process is measured."""
    layer = LayerBench(engine, shape, weight_format, placement)
    after_load = _resident()
    layer.run(make_batch(shape, tokens), rank, backward=True)
    weights = layer.weights.nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    allowed = int(WEIGHT_FACTOR * weights) + RUNTIME_BYTES
    return MemoryRow(weight_format, tokens, rank, weights, layer.adapter_bytes(rank), after_load, peak, allowed)


def memory_as_json(rows: Sequence[MemoryRow]) -> dict[str, object]:
    return {"rows": [asdict(row) for row in rows]}


def print_memory(console: Console, row: MemoryRow) -> None:
    table = Table(title=f"{row.format}, {row.tokens} tokens, rank {row.rank}", title_justify="left")
    for name in ("weights", "adapter and gradients", "after loading", "peak", "allowed", "within"):
        table.add_column(name, justify="right")
    sizes = (row.weights, row.adapter, row.after_load, row.peak, row.allowed)
    table.add_row(*(format_bytes(size) for size in sizes), "yes" if row.peak <= row.allowed else "no")
    console.print(table)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()
