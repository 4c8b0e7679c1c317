"""Runs a reference case on the native engine."""

from __future__ import annotations

import dataclasses

import kt_expert_native as native
import numpy as np
import torch

from golden.reference import Case, Golden, bf16_bits, from_bf16_bits


def layer_spec(case: Case) -> native.LayerSpec:
    shape = case.shape
    return native.LayerSpec(
        shape.experts, shape.hidden, shape.intermediate, shape.activation, shape.alpha, shape.limit, shape.bias
    )


def lora_spec(case: Case) -> native.AdapterSpec:
    return native.AdapterSpec(**dataclasses.asdict(case.lora))


def load_weights(case: Case, weight_format: str = "bf16", nodes: int = 1) -> native.LayerWeights:
    weights = native.LayerWeights(layer_spec(case), weight_format, nodes)
    for name, values in case.weights.items():
        for expert in range(case.shape.experts):
            weights.set_matrix(name, expert, bf16_bits(values[expert]))
    for name, values in case.biases.items():
        for expert in range(case.shape.experts):
            weights.bias(name, expert)[:] = values[expert].float().numpy()
    return weights


def load_adapter(case: Case) -> native.AdapterTensors | None:
    if not case.adapter:
        return None
    tensors = native.AdapterTensors(layer_spec(case), lora_spec(case))
    for name, values in case.adapter.items():
        tensors.tensor(name)[:] = values.float().numpy()
    return tensors


def tokens(values: torch.Tensor, dtype: str) -> np.ndarray:
    return bf16_bits(values) if dtype == "bf16" else values.float().numpy()


def empty_tokens(case: Case, dtype: str) -> np.ndarray:
    return np.empty((case.shape.tokens, case.shape.hidden), np.uint16 if dtype == "bf16" else np.float32)


def as_float64(values: np.ndarray) -> torch.Tensor:
    return from_bf16_bits(values) if values.dtype == np.uint16 else torch.from_numpy(values).double()


def run(
    engine: native.Engine, case: Case, dtype: str = "bf16", weight_format: str = "bf16", save: str = "activations",
    tile_tokens: int | None = None,
) -> Golden:  # fmt: skip
    """One forward and backward, in parts of so many tokens: what the reference's golden() returns, computed by the engine."""
    weights, adapter = load_weights(case, weight_format, engine.nodes), load_adapter(case)
    gradients = native.AdapterTensors(layer_spec(case), lora_spec(case)) if adapter is not None else None
    y, dx = empty_tokens(case, dtype), empty_tokens(case, dtype)
    d_weights = np.empty((case.shape.tokens, case.shape.top_k), np.float32)
    x, dy, ids = tokens(case.x, dtype), tokens(case.dy, dtype), case.ids.to(torch.int32).numpy()
    routing = case.routing_weights.float().numpy()
    step = tile_tokens or max(case.shape.tokens, 1)
    tiles = [slice(first, first + step) for first in range(0, max(case.shape.tokens, 1), step)]
    dropout = case.dropout_seed, case.dropout_layer
    tickets = [
        engine.forward(weights, adapter, x[at], ids[at], routing[at], y[at], save, *dropout, None, at.start) for at in tiles
    ]
    for at, ticket in zip(tiles, tickets, strict=True):
        assert ticket is not None
        engine.backward(weights, adapter, gradients, ticket, dy[at], dx[at], d_weights[at])
    names = gradients.names() if gradients is not None else []
    return Golden(
        as_float64(y),
        as_float64(dx),
        torch.from_numpy(d_weights).double(),
        {name: torch.from_numpy(gradients.tensor(name).copy()).double() for name in names if gradients is not None},
    )
