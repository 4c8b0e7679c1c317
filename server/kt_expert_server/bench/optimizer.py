"""Optimizer steps over one layer's LoRA, as a fraction of what memory gives to changing it in place."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import kt_expert_native as native
from kt_expert_proto.lora import TENSORS
from rich.console import Console
from rich.table import Table

from kt_expert_server.bench.shapes import LayerShape

KINDS = ("adamw", "adam", "sgd", "adafactor")
MOMENTS = ("fp32", "bf16")
_GIGA = 1e9
_PARAMETER_BYTES = 12  # read and written, and the gradient read
# Read and written per parameter; Adafactor's two vectors are nothing beside a matrix.
_MOMENTS_OF = {"adamw": 2, "adam": 2, "sgd": 1, "adafactor": 0}
_MOMENT_BYTES = {"fp32": 8, "bf16": 4}


@dataclass(frozen=True, slots=True)
class OptimizerRow:
    """One optimizer over `parameters` LoRA parameters; `moved` bytes are what the update must read and write."""

    optimizer: str
    moments: str
    rank: int
    parameters: int
    seconds: float
    moved: int
    bandwidth_fraction: float


@dataclass(frozen=True, slots=True)
class OptimizerReport:
    isa: str
    threads: int
    update_gbs: float
    rows: Sequence[OptimizerRow]

    def as_json(self) -> dict[str, object]:
        return asdict(self)


class _Contender:
    def __init__(self, engine: native.Engine, tensors: dict[str, native.AdapterTensors], kind: str, moments: str) -> None:
        self.kind, self.moments = kind, moments
        self._engine, self._tensors = engine, tensors
        self._update = native.OptimizerUpdate(kind, learning_rate=1e-4, momentum=0.9)

    def run(self, state: native.OptimizerState) -> float:
        step = native.LayerStep(dict.fromkeys(TENSORS, (self._update, 1.0)))
        begun = time.perf_counter()
        self._engine.step([(step, [self._tensors["gradients"]], self._tensors["parameters"], state, None)])
        return time.perf_counter() - begun


def measure_optimizers(engine: native.Engine, shape: LayerShape, ranks: Sequence[int], repeats: int) -> OptimizerReport:
    """Interleaved repeats of every optimizer and moment type; medians, and the memory's own speed from the same run."""
    layer = native.LayerSpec(shape.experts, shape.hidden, shape.intermediate)
    speeds, rows = [engine.measure_update_bandwidth()], []
    for rank in ranks:
        lora = native.AdapterSpec(rank_gate=rank, rank_up=rank, rank_down=rank, scale_gate=1.0, scale_up=1.0, scale_down=1.0)
        tensors = {name: native.AdapterTensors(layer, lora) for name in ("parameters", "gradients")}
        for name in tensors["gradients"].names():
            tensors["gradients"].tensor(name)[...] = 1e-3
        contenders = [_Contender(engine, tensors, kind, moments) for kind in KINDS for moments in MOMENTS[: _choices(kind)]]
        seconds: list[list[float]] = [[] for _ in contenders]
        for _ in range(repeats):
            for contender, found in zip(contenders, seconds, strict=True):
                # A state of its own each time: all of them together would not fit beside large layers.
                state = native.OptimizerState(layer, lora, contender.kind.replace("adamw", "adam"), contender.moments)
                contender.run(state)  # touches its pages
                found.append(contender.run(state))
            speeds.append(engine.measure_update_bandwidth())
        parameters, speed = tensors["parameters"].nbytes // 4, statistics.median(speeds)
        for contender, found in zip(contenders, seconds, strict=True):
            moved = parameters * (_PARAMETER_BYTES + _MOMENTS_OF[contender.kind] * _MOMENT_BYTES[contender.moments])
            median = statistics.median(found)
            fraction = moved / median / speed
            rows.append(OptimizerRow(contender.kind, contender.moments, rank, parameters, median, moved, fraction))
    return OptimizerReport(engine.isa, engine.threads, statistics.median(speeds) / _GIGA, rows)


def print_optimizers(console: Console, report: OptimizerReport) -> None:
    table = Table(title=f"optimizer steps, {report.update_gbs:.1f} GB/s of reading and writing", title_justify="left")
    for name in ("optimizer", "moments", "rank", "parameters", "ms", "GB/s", "of memory"):
        table.add_column(name, justify="left" if name in ("optimizer", "moments") else "right")
    for row in report.rows:
        table.add_row(
            row.optimizer,
            row.moments,
            str(row.rank),
            f"{row.parameters:,}",
            f"{row.seconds * 1e3:.2f}",
            f"{row.moved / row.seconds / _GIGA:.1f}",
            f"{row.bandwidth_fraction:.2f}",
        )
    console.print(table)


def _choices(kind: str) -> int:
    """Adafactor keeps its vectors in fp32 whatever is asked."""
    return 1 if kind == "adafactor" else len(MOMENTS)
