"""Interleaved measurement of every contender, and what each of the engine's rows is a fraction of.

Machines are shared and their speed drifts: in every repeat each contender runs once, medians are compared, and the
machine's own peaks are measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import kt_expert_native as native
import numpy as np

from kt_expert_server.bench.layer import Batch, LayerBench, make_batch
from kt_expert_server.bench.peers import Peer
from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.model.placement import ONE_NODE, Placement

PASSES = ("forward", "backward")
_ERROR_TOKENS = 16  # whose outputs in quantised formats are compared with bf16's
_GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Row:
    """One of the engine's measurements. `weight_error` is the relative L2 of the output against the same weights in bf16,
    which are normally distributed here; `versus` maps a contender to its time over ours, one with LoRA at equal rank only;
    `lora_overhead` is the time over that of rank 0, less one; `extra_bytes` is what the engine announces and takes beyond
    weights and adapter."""

    tokens: int
    direction: str
    format: str
    rank: int
    seconds: float
    gflops: float
    bound_fraction: float
    extra_bytes: int
    lora_overhead: float | None = None
    weight_error: float | None = None
    versus: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """`kernels` maps a weight format to what multiplied it."""

    shape: LayerShape
    isa: str
    kernels: Mapping[str, str]
    threads: int
    fma_peak_gflops: float
    read_gbs: float
    rows: Sequence[Row]

    def as_json(self) -> dict[str, object]:
        rows = [
            {
                "tokens": row.tokens,
                "pass": row.direction,
                "format": row.format,
                "rank": row.rank,
                "seconds": row.seconds,
                "gflops": row.gflops,
                "bound_fraction": row.bound_fraction,
                "extra_bytes": row.extra_bytes,
                "lora_overhead": row.lora_overhead,
                "weight_error": row.weight_error,
                "versus": dict(row.versus),
            }
            for row in self.rows
        ]
        shape = self.shape
        return {
            "isa": self.isa,
            "kernels": dict(self.kernels),
            "threads": self.threads,
            "shape": [shape.experts, shape.hidden, shape.intermediate, shape.top_k],
            "fma_peak_gflops": self.fma_peak_gflops,
            "read_gbs": self.read_gbs,
            "rows": rows,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    shape: LayerShape
    tokens: Sequence[int]
    ranks: Sequence[int]
    formats: Sequence[str]
    repeats: int
    placement: Placement = ONE_NODE


class _Samples:
    """Seconds by (contender, pass); the first of each pays for fresh pages and is dropped."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, str], list[float]] = {}

    def add(self, contender: str, seconds: tuple[float, float | None]) -> None:
        for direction, value in zip(PASSES, seconds, strict=True):
            if value is not None:
                self._seconds.setdefault((contender, direction), []).append(value)

    def median(self, contender: str, direction: str) -> float | None:
        values = self._seconds.get((contender, direction), [])
        return statistics.median(values[1:] or values) if values else None


def measure(
    plan: Plan, engine: native.Engine, peers: Sequence[Peer], on_rows: Callable[[Sequence[Row]], None] = lambda _: None
) -> Report:
    """Runs the plan; `on_rows` sees the rows of each batch size as they are finished."""
    layers = {name: LayerBench(engine, plan.shape, name, plan.placement) for name in plan.formats}
    peaks: list[float] = []
    bandwidths: list[float] = []
    measured: list[tuple[Batch, _Samples]] = []
    rows: list[Row] = []
    errors = _weight_errors(layers, make_batch(plan.shape, _ERROR_TOKENS))
    for tokens in plan.tokens:
        batch, samples = make_batch(plan.shape, tokens), _Samples()
        for _ in range(plan.repeats + 1):
            peaks.append(engine.measure_peak_flops() / _GIGA)
            bandwidths.append(engine.measure_read_bandwidth() / _GIGA)
            for name, layer in layers.items():
                for rank in plan.ranks:
                    samples.add(_own(name, rank), layer.run(batch, rank, backward=True))
            for peer in peers:
                samples.add(_peer_key(peer), peer.run(batch))
        measured.append((batch, samples))
        peak, bandwidth = statistics.median(peaks), statistics.median(bandwidths)
        rows = [row for made in measured for row in _rows(plan, layers, peers, *made, peak, bandwidth, errors)]
        on_rows([row for row in rows if row.tokens == tokens])
    return Report(
        plan.shape,
        engine.isa,
        {name: engine.kernel(name) for name in plan.formats},
        engine.threads,
        statistics.median(peaks),
        statistics.median(bandwidths),
        rows,
    )


def _weight_errors(layers: Mapping[str, LayerBench], batch: Batch) -> dict[str, float]:
    """Of every quantised format against bf16; empty where bf16 is not among them."""
    if "bf16" not in layers:
        return {}
    expected = layers["bf16"].output(batch)
    others = {name: layer.output(batch) for name, layer in layers.items() if name != "bf16"}
    return {name: float(np.linalg.norm(got - expected) / np.linalg.norm(expected)) for name, got in others.items()}


def _own(weight_format: str, rank: int) -> str:
    return f"{weight_format}/{rank}"


def _peer_key(peer: Peer) -> str:
    return f"{peer.name}/{peer.rank}"


def _rows(
    plan: Plan,
    layers: Mapping[str, LayerBench],
    peers: Sequence[Peer],
    batch: Batch,
    samples: _Samples,
    peak: float,
    bandwidth: float,
    errors: Mapping[str, float],
) -> list[Row]:
    rows = []
    flop = plan.shape.flop(batch.tokens)
    for name, layer in layers.items():
        weight_bytes = batch.active_experts * layer.bytes_per_expert
        bound = max(flop / (peak * _GIGA), weight_bytes / (bandwidth * _GIGA))
        for rank in plan.ranks:
            for direction in PASSES:
                seconds = samples.median(_own(name, rank), direction)
                if seconds is None:
                    raise AssertionError("every plan measures both passes")
                plain = samples.median(_own(name, 0), direction) if rank and 0 in plan.ranks else None
                others = {peer.name: samples.median(_peer_key(peer), direction) for peer in peers if peer.rank in (None, rank)}
                if name != "bf16" and "bf16" in layers:
                    others["bf16"] = samples.median(_own("bf16", rank), direction)
                rows.append(
                    Row(
                        batch.tokens,
                        direction,
                        name,
                        rank,
                        seconds,
                        flop / seconds / _GIGA,
                        bound / seconds,
                        layer.extra_bytes(batch, rank),
                        None if plain is None else seconds / plain - 1.0,
                        errors.get(name),
                        {other: value / seconds for other, value in others.items() if value is not None},
                    )
                )
    return rows
