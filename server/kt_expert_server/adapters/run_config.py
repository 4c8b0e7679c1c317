"""What makes two openings of one name the same run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import zip_longest

from kt_expert_proto.lora import LayerLora

from kt_expert_server.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class RunConfig:
    """The fields are those of the protocol."""

    world_size: int
    wire_dtype: str  # "bf16" or "fp32"
    lora: tuple[LayerLora, ...]
    seed: int
    moment_dtype: str = "fp32"  # or "bf16"
    tickets: str = "activations"  # or "inputs"


def describe_differences(existing: RunConfig, asked: RunConfig) -> str:
    """What two configurations say differently; empty where nothing."""
    found = []
    for each in fields(RunConfig):
        ours, theirs = getattr(existing, each.name), getattr(asked, each.name)
        if ours == theirs:
            continue
        if each.name == "lora":
            layers = zip_longest(existing.lora, asked.lora)
            ours, theirs = next(pair for pair in layers if pair[0] != pair[1])
        found.append(f"{each.name} is {ours}, asked for {theirs}")
    return "; ".join(found)


def require_same_lora(checkpoint: str, stored: Sequence[LayerLora], run: str, asked: Sequence[LayerLora]) -> None:
    """Raises InvalidRequest for other layers, ranks or scales. Dropout leaves nothing in a snapshot."""
    ours, theirs = ({lora.layer: replace(lora, dropout=0.0) for lora in each} for each in (asked, stored))
    for layer in sorted(ours.keys() | theirs.keys()):
        if ours.get(layer) != theirs.get(layer):
            raise InvalidRequest(
                f"checkpoint {checkpoint!r} has other LoRA shapes than run {run!r}: layer {layer} has {theirs.get(layer)} "
                f"there and {ours.get(layer)} here"
            )
