"""kt-expert bench layer: forward and backward of one MoE layer on this machine, beside torch where it is installed.

Repeats of the contenders are interleaved and medians compared, because machines are shared and speeds drift.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import kt_expert_native as native
import numpy as np
from numpy.typing import NDArray

from kt_expert_server.config import available_cores
from kt_expert_server.errors import InvalidRequest

SHAPES = {
    "qwen3-30b-a3b": (128, 2048, 768, 8),
    "olmoe-1b-7b": (64, 2048, 1024, 8),
    "tiny": (8, 256, 128, 2),
}
_PATTERN_ELEMENTS = 1 << 20  # distinct weights; repeated to fill the layer, which costs nothing to make


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `versus_torch` is torch's fp32 loop over the same routes without LoRA, its time over ours."""

    tokens: int
    direction: str
    rank: int
    seconds: float
    gflops: float
    versus_torch: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("layer",))
    parser.add_argument("--shape", default="qwen3-30b-a3b", help=f"one of {', '.join(SHAPES)}, or E,H,I,k")
    parser.add_argument("--tokens", default="1,16,128,512", help="batch sizes, separated by commas")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank; 0 for none")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")


def run(options: argparse.Namespace) -> int:
    experts, hidden, intermediate, top_k = _shape(options.shape)
    bench = _LayerBench(experts, hidden, intermediate, top_k, options.rank, options.threads)
    print(f"{options.shape}: E={experts} H={hidden} I={intermediate} k={top_k}, rank {options.rank}, "
          f"{bench.engine.kernel} on {options.threads} threads")  # fmt: skip
    print(f"{'tokens':>7} {'pass':>9} {'ms':>10} {'GFLOP/s':>9} {'vs torch':>9}")
    rows = []
    for tokens in (int(text) for text in options.tokens.split(",")):
        for row in bench.measure(tokens, options.repeats):
            versus = "-" if row.versus_torch is None else f"{row.versus_torch:.2f}x"
            print(f"{row.tokens:7} {row.direction:>9} {row.seconds * 1e3:10.2f} {row.gflops:9.1f} {versus:>9}", flush=True)
            rows.append(row)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        about = {"isa": bench.engine.isa, "kernel": bench.engine.kernel, "threads": options.threads, "shape": options.shape}
        options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1), encoding="utf-8")
    return 0


def _shape(text: str) -> tuple[int, int, int, int]:
    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() for part in parts):
        raise InvalidRequest(f"shape {text!r} is neither one of {', '.join(SHAPES)} nor E,H,I,k")
    experts, hidden, intermediate, top_k = (int(part) for part in parts)
    return experts, hidden, intermediate, top_k


class _LayerBench:
    def __init__(self, experts: int, hidden: int, intermediate: int, top_k: int, rank: int, threads: int) -> None:
        self.engine = native.Engine(threads)
        self._threads = threads
        self._sizes = (experts, hidden, intermediate, top_k)
        self._rank = rank
        self._generator = np.random.default_rng(0)
        spec = native.LayerSpec(experts, hidden, intermediate)
        self._weights = native.LayerWeights(spec)
        pattern = self._generator.standard_normal(_PATTERN_ELEMENTS).astype(np.float32) * np.float32(hidden**-0.5)
        bits = (pattern.view(np.uint32) >> 16).astype(np.uint16)
        for projection in ("gate", "up", "down"):
            for expert in range(experts):
                self._weights.set_matrix(projection, expert, np.resize(bits, hidden * intermediate))
        self._adapter = self._gradients = None
        if rank:
            lora = native.LoraSpec(
                tied=True, rank_gate=rank, rank_up=rank, rank_down=rank, scale_gate=2.0, scale_up=2.0, scale_down=2.0
            )
            self._adapter, self._gradients = native.LoraTensors(spec, lora), native.LoraTensors(spec, lora)
            for name in self._adapter.names():
                self._adapter.tensor(name)[...] = 0.01

    def measure(self, tokens: int, repeats: int) -> list[Row]:
        experts, hidden, intermediate, top_k = self._sizes
        x = self._generator.standard_normal((tokens, hidden)).astype(np.float32)
        ids = np.ascontiguousarray(np.argsort(self._generator.random((tokens, experts)), axis=1)[:, :top_k], np.int32)
        weights = np.full((tokens, top_k), 1.0 / top_k, np.float32)
        y, dx, d_weights = np.empty_like(x), np.empty_like(x), np.empty_like(weights)
        torch_forward = self._torch_forward(x, ids, weights)
        forward, backward, torch_times = [], [], []
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            ticket = self.engine.forward(self._weights, self._adapter, x, ids, weights, y, "activations")
            middle = time.perf_counter()
            if ticket is None:
                raise AssertionError("a saving forward returns a ticket")
            self.engine.backward(self._weights, self._adapter, self._gradients, ticket, x, dx, d_weights)
            forward.append(middle - begun)
            backward.append(time.perf_counter() - middle)
            if torch_forward is not None:
                begun = time.perf_counter()
                torch_forward()
                torch_times.append(time.perf_counter() - begun)
        flops = 6.0 * tokens * top_k * hidden * intermediate
        peer = statistics.median(torch_times[1:]) if torch_times else None
        rows = []
        for direction, times, other in (("forward", forward, peer), ("backward", backward, None)):
            seconds = statistics.median(times[1:])  # the first pays for fresh pages
            versus = other / seconds if other is not None else None
            rows.append(Row(tokens, direction, self._rank, seconds, flops / seconds / 1e9, versus))
        return rows

    def _torch_forward(
        self, x: NDArray[np.float32], ids: NDArray[np.int32], weights: NDArray[np.float32]
    ) -> Callable[[], object] | None:
        """transformers' eager loop over experts, in fp32, on one distinct expert's weights."""
        # OpenMP's threads would spin on after each of torch's loops, into the time of what is measured next.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            import torch
        except ImportError:
            return None
        torch.set_num_threads(self._threads)
        gate, up, down = (torch.from_numpy(self._weights.dequantized(name, 0)) for name in ("gate", "up", "down"))
        tokens, chosen, scale = torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(weights)

        def forward() -> object:
            output = torch.zeros_like(tokens)
            for expert in chosen.unique().tolist():
                token, slot = torch.where(chosen == expert)
                rows = tokens[token]
                h = torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)
                output.index_add_(0, token, (h @ down.T) * scale[token, slot, None])
            return output

        return forward
