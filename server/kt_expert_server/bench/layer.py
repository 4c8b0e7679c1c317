"""One layer of random weights on the engine, and batches to run through it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import kt_expert_native as native
import numpy as np
from numpy.typing import NDArray

from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.model.placement import ONE_NODE, Placement

_SEED = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """x and dy [T, H] as bf16 bits, ids and routing weights [T, k]; every token's experts are distinct."""

    x: NDArray[np.uint16]
    dy: NDArray[np.uint16]
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]

    @property
    def tokens(self) -> int:
        return len(self.x)

    @property
    def active_experts(self) -> int:
        return len(np.unique(self.ids))


def bf16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Truncated, not rounded: random values need no better."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def make_batch(shape: LayerShape, tokens: int) -> Batch:
    generator = np.random.default_rng(_SEED + tokens)
    x, dy = (bf16_bits(generator.standard_normal((tokens, shape.hidden), np.float32)) for _ in range(2))
    order = np.argsort(generator.random((tokens, shape.experts)), axis=1)[:, : shape.top_k]
    weights = np.full((tokens, shape.top_k), 1.0 / shape.top_k, np.float32)
    return Batch(x, dy, np.ascontiguousarray(order, np.int32), weights)


def random_matrix(shape: LayerShape, generator: np.random.Generator) -> NDArray[np.uint16]:
    """One H x I matrix, flat. Distinct experts share its values in another order: the bytes differ, and drawing them
    anew for a hundred experts would take longer than the measurement."""
    return bf16_bits(generator.standard_normal(shape.hidden * shape.intermediate, np.float32) * np.float32(shape.hidden**-0.5))


class LayerBench:
    """An engine's layer in one weight format, placed as the engine is."""

    def __init__(self, engine: native.Engine, shape: LayerShape, weight_format: str, placement: Placement = ONE_NODE) -> None:
        self.engine = engine
        self.shape = shape
        self.weight_format = weight_format
        self._spec = native.LayerSpec(shape.experts, shape.hidden, shape.intermediate)
        self.weights = placement.weights(self._spec, weight_format)
        generator = np.random.default_rng(_SEED)
        pattern = random_matrix(shape, generator)
        for expert in range(shape.experts):
            for number, projection in enumerate(("gate", "up", "down")):
                self.weights.set_matrix(projection, expert, np.roll(pattern, 64 * (3 * expert + number)))
        self._adapters: dict[int, tuple[native.AdapterTensors, native.AdapterTensors]] = {}
        self._kept: dict[Any, tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.float32]]] = {}  # outputs, by shape

    @property
    def bytes_per_expert(self) -> float:
        return self.weights.nbytes / self.shape.experts

    def run(
        self, batch: Batch, rank: int, *, backward: bool, tile_tokens: int | None = None
    ) -> tuple[float, float | None]:  # fmt: skip
        """Seconds of one forward and, where asked for, of its backward with LoRA gradients. In parts of so many tokens, or
        whole."""
        adapter, gradients = self._adapter(rank)
        y, dx, d_weights = self._outputs(batch)
        save = "activations" if backward else "nothing"
        tokens = len(batch.x)
        step = tile_tokens or max(tokens, 1)
        tiles = [slice(first, first + step) for first in range(0, tokens, step)]
        begun = time.perf_counter()
        tickets = [
            self.engine.forward(self.weights, adapter, batch.x[at], batch.ids[at], batch.weights[at], y[at], save)
            for at in tiles
        ]
        forward = time.perf_counter() - begun
        if not backward:
            return forward, None
        begun = time.perf_counter()
        for at, ticket in zip(tiles, tickets, strict=True):
            assert ticket is not None  # noqa: S101  # activations were asked for
            self.engine.backward(self.weights, adapter, gradients, ticket, batch.dy[at], dx[at], d_weights[at])
        return forward, time.perf_counter() - begun

    def output(self, batch: Batch) -> NDArray[np.float32]:
        """y [T, H] of the base model alone, for tokens in fp32."""
        x = (batch.x.astype(np.uint32) << 16).view(np.float32)
        y = np.empty_like(x)
        self.engine.forward(self.weights, None, x, batch.ids, batch.weights, y)
        return y

    def adapter_bytes(self, rank: int) -> int:
        """Of the adapter and its gradients."""
        return sum(tensors.nbytes for tensors in self._adapter(rank) if tensors is not None)

    def extra_bytes(self, batch: Batch, rank: int) -> int:
        """Peak memory of a forward and backward beyond the weights and the adapter: scratch and one ticket."""
        lora = self._lora(rank)
        tokens, top_k = batch.ids.shape
        ticket = self.engine.ticket_bytes(self._spec, lora, tokens, top_k, "bf16")
        return self.engine.scratch_bytes(self._spec, lora, tokens, top_k) + ticket

    def _outputs(self, batch: Batch) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.float32]]:
        """Used again, as a server's are: pages of fresh memory would count for the layer."""
        key = batch.x.shape, batch.weights.shape
        if key not in self._kept:
            self._kept[key] = np.zeros_like(batch.x), np.zeros_like(batch.x), np.zeros_like(batch.weights)
        return self._kept[key]

    def _lora(self, rank: int) -> native.AdapterSpec:
        if rank == 0:
            return native.AdapterSpec()
        return native.AdapterSpec(rank_gate=rank, rank_up=rank, rank_down=rank, scale_gate=2.0, scale_up=2.0, scale_down=2.0)

    def _adapter(self, rank: int) -> tuple[native.AdapterTensors | None, native.AdapterTensors | None]:
        if rank == 0:
            return None, None
        if rank not in self._adapters:
            lora = self._lora(rank)
            adapter, gradients = native.AdapterTensors(self._spec, lora), native.AdapterTensors(self._spec, lora)
            for name in adapter.names():
                adapter.tensor(name)[...] = 0.01
                gradients.tensor(name)[...] = 0.0  # touches the pages
            self._adapters[rank] = adapter, gradients
        return self._adapters[rank]
