"""Finds the expert tensors of a model directory and works out every layer's shape before anything is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kt_expert_server.errors import ModelError
from kt_expert_server.model.architecture import (
    FP8_SCALE_SUFFIX,
    ActivationSpec,
    Family,
    Naming,
    activation_of,
    family_of,
    layer_pattern,
    top_k_of,
)
from kt_expert_server.model.content import LayerContent, content_digest
from kt_expert_server.model.quantised import MXFP4_GROUP, scale_shape
from kt_expert_server.model.safetensors_file import FLOAT_BYTES, SafetensorsFile, TensorInfo

_INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
BF16_BYTES = 2
FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One MoE layer as the checkpoint has it. `tensors` maps the names below `prefix` to file and position."""

    layer: int
    prefix: str
    naming: Naming
    num_experts: int
    hidden_size: int
    intermediate_size: int
    top_k: int
    activation: ActivationSpec
    has_bias: bool
    tensors: Mapping[str, tuple[str, TensorInfo]]

    @property
    def form(self) -> str:
        """The weight format the checkpoint holds it in: bf16 for all floating-point types."""
        if self.naming.scales is not None:
            return "mxfp4"
        return "fp8" if any(name.endswith(FP8_SCALE_SUFFIX) for name in self.tensors) else "bf16"

    @property
    def about(self) -> str:
        """What it computes, but for the weights."""
        sizes = f"{self.num_experts} experts of {self.hidden_size} x {self.intermediate_size}"
        activation = f"{self.activation.kind} {self.activation.alpha:g} {self.activation.limit:g}"
        return f"layer {self.layer}: {sizes}, {activation}, bias {self.has_bias}"

    @property
    def bf16_bytes(self) -> int:
        """Bytes of its matrices in bf16 and its biases in fp32: what the progress of a load counts."""
        matrices = 3 * self.num_experts * self.hidden_size * self.intermediate_size * BF16_BYTES
        biases = self.num_experts * (2 * self.intermediate_size + self.hidden_size) * FP32_BYTES
        return matrices + (biases if self.has_bias else 0)


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A base model before loading."""

    directory: Path
    model_type: str
    digest: str  # of the experts' weights; see content.py
    layers: tuple[LayerPlan, ...]

    @property
    def form(self) -> str:
        """The weight format of the checkpoint; where layers differ, all of them."""
        return "+".join(sorted({layer.form for layer in self.layers}))

    @property
    def bf16_bytes(self) -> int:
        return sum(layer.bf16_bytes for layer in self.layers)


def plan_model(directory: Path) -> ModelPlan:
    """Reads config, headers and samples of the weights. Raises ModelError that says what is missing or not supported."""
    if not directory.is_dir():
        raise ModelError(f"model directory {directory} does not exist; give a directory with config.json and safetensors")
    config = _read_json(directory / "config.json")
    family = family_of(config)
    index = tensor_index(directory)
    layers = _layers(config, family, index)
    if not layers:
        raise ModelError(
            f"{directory} has no expert tensors: {len(index)} tensors were seen and none is named like the experts of "
            f"{config['model_type']}; was the checkpoint saved without them?"
        )
    digest = content_digest(directory, [LayerContent(each.about, each.num_experts, each.tensors) for each in layers])
    return ModelPlan(directory, str(config["model_type"]), digest, layers)


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def tensor_index(directory: Path) -> dict[str, tuple[str, TensorInfo]]:
    """Every tensor of the checkpoint with its file. A shard that the index names and that is missing is an error."""
    if (directory / _INDEX_NAME).exists():
        weight_map = _read_json(directory / _INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ModelError(f"{_INDEX_NAME} has no weight_map")
        files = sorted({str(name) for name in weight_map.values()})
        unsafe = [name for name in files if Path(name).name != name]
        if unsafe:
            raise ModelError(f"{_INDEX_NAME} names files outside the model directory: {unsafe[0]}")
        missing = [name for name in files if not (directory / name).is_file()]
        if missing:
            raise ModelError(f"{len(missing)} of {len(files)} shards are missing, the first is {missing[0]}; fetch them again")
    elif (directory / _SINGLE_NAME).is_file():
        weight_map, files = None, [_SINGLE_NAME]
    else:
        raise ModelError(f"{directory} has neither {_INDEX_NAME} nor {_SINGLE_NAME}")
    found: dict[str, tuple[str, TensorInfo]] = {}
    for name in files:
        with SafetensorsFile(directory / name) as file:
            found |= {tensor: (name, info) for tensor, info in file.tensors.items()}
    absent = [tensor for tensor in weight_map or {} if tensor not in found]
    if absent:
        raise ModelError(f"{len(absent)} tensors of {_INDEX_NAME} are in no shard, the first is {absent[0]}")
    return found


def _layers(config: Mapping[str, object], family: Family, index: Mapping[str, tuple[str, TensorInfo]]) -> tuple[LayerPlan, ...]:
    found: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    about: dict[str, tuple[int, Naming]] = {}
    for naming in family.namings:
        pattern = layer_pattern(naming)
        for tensor, place in index.items():
            match = pattern.match(tensor)
            if match is not None:
                found.setdefault(match["prefix"], {})[match["tensor"]] = place
                if match["tensor"] not in (naming.biases or ()):  # they are called alike in two namings
                    about[match["prefix"]] = (int(match["layer"]), naming)
    depth = config.get("num_hidden_layers")
    plans = [
        _layer_plan(config, family, prefix, *about[prefix], tensors)
        for prefix, tensors in found.items()
        if prefix in about
        # Layers past num_hidden_layers predict further tokens (MTP) and are no part of the trained model.
        and (not isinstance(depth, int) or about[prefix][0] < depth)
    ]
    return tuple(sorted(plans, key=lambda plan: plan.layer))


def _layer_plan(
    config: Mapping[str, object],
    family: Family,
    prefix: str,
    layer: int,
    naming: Naming,
    tensors: Mapping[str, tuple[str, TensorInfo]],
) -> LayerPlan:
    if naming.scales is not None:
        experts, hidden, intermediate = _mxfp4_sizes(naming, prefix, tensors)
    elif naming.fused:
        experts, hidden, intermediate = _fused_sizes(naming, prefix, tensors)
    else:
        experts, hidden, intermediate = _expert_sizes(naming, prefix, tensors)
    if min(experts, hidden, intermediate) < 1:
        raise ModelError(f"{prefix} has {experts} experts of {hidden} x {intermediate}, expected at least 1 of each")
    expected = config.get("hidden_size")
    if isinstance(expected, int) and expected != hidden:
        raise ModelError(f"{prefix} has hidden size {hidden}, config.json says {expected}")
    return LayerPlan(
        layer,
        prefix,
        naming,
        experts,
        hidden,
        intermediate,
        top_k_of(config, family, layer),
        activation_of(config, family),
        naming.biases is not None,
        tensors,
    )


def _expert_sizes(naming: Naming, prefix: str, tensors: Mapping[str, tuple[str, TensorInfo]]) -> tuple[int, int, int]:
    if naming.per_expert is None:
        raise ModelError(f"{prefix} has no per-expert names")
    experts = 1 + max(int(found[0]) for name in tensors if (found := re.findall(r"experts\.(\d+)\.", name)))
    gate, up, down = naming.per_expert
    coded = any(name.endswith(FP8_SCALE_SUFFIX) for name in tensors)
    dtypes = ("F8_E4M3",) if coded else tuple(FLOAT_BYTES)
    intermediate, hidden = _shape(prefix, tensors, gate.format(e=0), 2, dtypes)
    unknown = set(tensors)
    for expert in range(experts):
        for name, shape in (
            (gate, (intermediate, hidden)),
            (up, (intermediate, hidden)),
            (down, (hidden, intermediate)),
        ):
            full = name.format(e=expert)
            _require_shape(prefix, tensors, full, shape, dtypes)
            if coded:
                _require_shape(prefix, tensors, full + FP8_SCALE_SUFFIX, scale_shape("fp8", *shape))
            unknown -= {full, full + FP8_SCALE_SUFFIX}
    if unknown:
        raise ModelError(f"{prefix} has {len(unknown)} tensors of no expert, the first is {min(unknown)}")
    return experts, hidden, intermediate


def _fused_sizes(naming: Naming, prefix: str, tensors: Mapping[str, tuple[str, TensorInfo]]) -> tuple[int, int, int]:
    if naming.fused is None:
        raise ModelError(f"{prefix} has no fused names")
    experts, first, second = _shape(prefix, tensors, naming.fused[1], 3)
    intermediate, hidden = (first, second) if naming.transposed else (second, first)
    wide = (hidden, 2 * intermediate) if naming.transposed else (2 * intermediate, hidden)
    got = _shape(prefix, tensors, naming.fused[0], 3)
    if got != (experts, *wide):
        raise ModelError(f"{prefix}{naming.fused[0]} has shape {got}, expected {(experts, *wide)}")
    for name, width in zip(naming.biases or (), (2 * intermediate, hidden), strict=False):
        if _shape(prefix, tensors, name, 2) != (experts, width):
            raise ModelError(f"{prefix}{name} has another shape than {(experts, width)}")
    return experts, hidden, intermediate


def _mxfp4_sizes(naming: Naming, prefix: str, tensors: Mapping[str, tuple[str, TensorInfo]]) -> tuple[int, int, int]:
    """Blocks are [E, rows, groups, 16 bytes], scales [E, rows, groups]."""
    if naming.fused is None or naming.scales is None:
        raise ModelError(f"{prefix} has no fused names")
    gate_up, down = naming.fused
    experts, wide, groups, _ = _shape(prefix, tensors, gate_up, 4, ("U8",))
    hidden, intermediate = groups * MXFP4_GROUP, wide // 2
    sizes = ((gate_up, naming.scales[0], 2 * intermediate, hidden), (down, naming.scales[1], hidden, intermediate))
    for blocks, scales, rows, columns in sizes:
        shape = (experts, *scale_shape("mxfp4", rows, columns))
        _require_shape(prefix, tensors, blocks, (*shape, MXFP4_GROUP // 2), ("U8",))
        _require_shape(prefix, tensors, scales, shape, ("U8",))
    for name, width in zip(naming.biases or (), (2 * intermediate, hidden), strict=False):
        _require_shape(prefix, tensors, name, (experts, width))
    return experts, hidden, intermediate


def _require_shape(
    prefix: str,
    tensors: Mapping[str, tuple[str, TensorInfo]],
    name: str,
    expected: tuple[int, ...],
    dtypes: tuple[str, ...] = tuple(FLOAT_BYTES),
) -> None:
    got = _shape(prefix, tensors, name, len(expected), dtypes)
    if got != expected:
        raise ModelError(f"{prefix}{name} has shape {got}, expected {expected}")


def _shape(
    prefix: str,
    tensors: Mapping[str, tuple[str, TensorInfo]],
    name: str,
    dimensions: int,
    dtypes: tuple[str, ...] = tuple(FLOAT_BYTES),
) -> tuple[int, ...]:
    if name not in tensors:
        raise ModelError(f"{prefix}{name} is missing from the checkpoint")
    info = tensors[name][1]
    if info.dtype not in dtypes:
        raise ModelError(f"{prefix}{name} has dtype {info.dtype}; supported here: {', '.join(dtypes)}")
    if len(info.shape) != dimensions:
        raise ModelError(f"{prefix}{name} has {len(info.shape)} dimensions, expected {dimensions}")
    return info.shape
