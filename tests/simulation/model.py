"""The tiny base model every schedule serves, and the numbers trainers send."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import kt_expert_native as native
import numpy as np
from kt_expert_proto.lora import DEFAULT_ADAPTER, LayerLora
from kt_expert_server.model.architecture import ActivationSpec, Naming
from kt_expert_server.model.index import LayerPlan, ModelPlan
from kt_expert_server.model.loader import BaseModel, LoadedLayer

EXPERTS, HIDDEN, INTER, TOP_K, LAYERS = 3, 16, 8, 2, 2
RANK = 2  # of every LoRA matrix
MADE_LATER, COPIED, WEIGHTS = "later", "copied", "weights"  # adapters; the last one is the layers' own weights
TOKENS = 3


@cache
def base_model() -> BaseModel:
    generator = np.random.default_rng(5)
    plans, layers = [], {}
    for index in range(LAYERS):
        plan = LayerPlan(
            index, f"model.layers.{index}.mlp", _naming(), EXPERTS, HIDDEN, INTER, TOP_K, ActivationSpec("silu", 1.0, 0.0),
            False, {},
        )  # fmt: skip
        spec = native.LayerSpec(EXPERTS, HIDDEN, INTER)
        weights = native.LayerWeights(spec)
        for expert in range(EXPERTS):
            for projection, shape in (("gate", (INTER, HIDDEN)), ("up", (INTER, HIDDEN)), ("down", (HIDDEN, INTER))):
                values = generator.standard_normal(shape).astype(np.float32) * 0.3
                weights.set_matrix(projection, expert, (values.view(np.uint32) >> 16).astype(np.uint16))
        plans.append(plan)
        layers[index] = LoadedLayer(plan, spec, weights)
    return BaseModel(ModelPlan(Path("none"), "simulated", "digest-of-the-simulated-model", tuple(plans)), layers)


def _naming() -> Naming:
    """Never read: nothing is loaded from disk."""
    return Naming("mlp")


def lora_of(layer: int, dropout: float = 0.0, adapter: str = DEFAULT_ADAPTER) -> LayerLora:
    """Those that trainings make on their way are of other ranks than the first one and its copies."""
    if adapter == WEIGHTS:
        return LayerLora(layer, full=True)
    if adapter == MADE_LATER:
        return LayerLora(layer, layer % 2 == 1, 1, 1, RANK, 0.5, 0.5, 1.0)
    return LayerLora(layer, layer % 2 == 0, RANK, RANK, RANK, 1.0, 1.0, 0.5, dropout)


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


@cache
def batch(run: int, rank: int, step: int, micro: int) -> Batch:
    """x [T, H], expert ids [T, k], routing weights [T, k]: what that micro-batch is, whoever computes it, and when."""
    generator = np.random.default_rng([run, rank, step, micro])
    x = generator.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    ids = np.argsort(generator.random((TOKENS, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    return x, np.ascontiguousarray(ids), generator.random((TOKENS, TOP_K)).astype(np.float32)
