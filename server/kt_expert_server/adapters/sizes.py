"""What adapters take of the server's memory, before they are made."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import kt_expert_native as native
from kt_expert_proto.lora import LayerLora

from kt_expert_server.adapters.adapter import TRAINED_FORMAT, native_lora
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.loader import BaseModel

OPTIMIZER_KINDS = ("adamw", "sgd", "adafactor")  # whose states exist; adam's is adamw's


def check_lora(model: BaseModel, lora: Iterable[LayerLora]) -> None:
    """Raises NotFound for a layer without experts, InvalidRequest for settings without a meaning."""
    seen: set[int] = set()
    for entry in lora:
        model.require_layer(entry.layer)
        if entry.layer in seen:
            raise InvalidRequest(f"layer {entry.layer} has two LoRA entries, expected one")
        seen.add(entry.layer)
        try:
            native_lora(entry)
        except native.InvalidArgument as error:
            raise InvalidRequest(f"layer {entry.layer}: {error}") from error


def parameter_bytes(model: BaseModel, lora: LayerLora) -> int:
    """fp32 bytes of one set of tensors of one layer."""
    return native.AdapterTensors.bytes_of(model.layers[lora.layer].spec, native_lora(lora))


def layer_bytes(model: BaseModel, lora: LayerLora) -> int:
    """Of a layer of an adapter: its parameters, and what passes use of them where they are weights."""
    base = model.layers[lora.layer]
    encoded = native.LayerWeights.nbytes_of(base.spec, TRAINED_FORMAT, base.weights.nodes) if lora.full else 0
    return parameter_bytes(model, lora) + encoded


def optimizer_bytes(model: BaseModel, lora: LayerLora, moment_dtype: str) -> int:
    """Of the largest state an optimizer may need for one layer."""
    spec, ranks = model.layers[lora.layer].spec, native_lora(lora)
    return max(native.OptimizerState.bytes_of(spec, ranks, kind, moment_dtype) for kind in OPTIMIZER_KINDS)


def step_bytes(model: BaseModel, lora: LayerLora, ranks: int, threads: int) -> int:
    """Scratch of a step over one layer."""
    spec = model.layers[lora.layer].spec
    return max(native.Engine.step_bytes(spec, native_lora(lora), kind, ranks, threads) for kind in OPTIMIZER_KINDS)


@dataclass(frozen=True, slots=True)
class TrainingBytes:
    """What training some layers takes beside their parameters. A step must not fail because other runs' tickets are many,
    so its scratch is among it."""

    gradients: int
    optimizer: int
    scratch: int

    @classmethod
    def of(cls, model: BaseModel, lora: Iterable[LayerLora], moment_dtype: str, world_size: int, threads: int) -> TrainingBytes:
        entries = list(lora)
        return cls(
            sum(parameter_bytes(model, each) for each in entries) * world_size,
            sum(optimizer_bytes(model, each, moment_dtype) for each in entries),
            max((step_bytes(model, each, world_size, threads) for each in entries), default=0),
        )

    def beyond(self, other: TrainingBytes) -> TrainingBytes:
        """What is needed on top of the other's."""
        return TrainingBytes(
            max(0, self.gradients - other.gradients),
            max(0, self.optimizer - other.optimizer),
            max(0, self.scratch - other.scratch),
        )
