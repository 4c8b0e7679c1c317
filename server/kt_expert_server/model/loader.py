"""Fills the engine's resident copy of the weights from a planned model, tensor by tensor, with no second copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kt_expert_native as native
import numpy as np
from numpy.typing import NDArray

from kt_expert_server.errors import ModelError, NotFound
from kt_expert_server.model.architecture import FP8_SCALE_SUFFIX
from kt_expert_server.model.bf16 import bf16_to_fp32, round_to_bf16
from kt_expert_server.model.index import BF16_BYTES, FP32_BYTES, LayerPlan, ModelPlan
from kt_expert_server.model.placement import ONE_NODE, Placement
from kt_expert_server.model.quantised import CodedMatrix
from kt_expert_server.model.safetensors_file import FLOAT_BYTES, SafetensorsFile, TensorInfo

AUTO_FORMAT = "auto"  # the checkpoint's own


@dataclass(frozen=True, slots=True)
class LoadedLayer:
    """One layer ready to compute."""

    plan: LayerPlan
    spec: native.LayerSpec
    weights: native.LayerWeights


_PROJECTIONS = ("gate", "up", "down")
_CODES_A_BYTE = 2  # of a 4-bit format


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base model. `layers` is keyed by the checkpoint's layer index."""

    plan: ModelPlan
    layers: dict[int, LoadedLayer]

    def require_layer(self, layer: int) -> LoadedLayer:
        """Raises NotFound for a layer without experts."""
        found = self.layers.get(layer)
        if found is None:
            indices = sorted(self.layers)
            raise NotFound(f"layer {layer} has no experts; layers with experts: {indices[0]} to {indices[-1]} ({len(indices)})")
        return found


def native_spec(plan: LayerPlan) -> native.LayerSpec:
    return native.LayerSpec(
        plan.num_experts,
        plan.hidden_size,
        plan.intermediate_size,
        plan.activation.kind,
        plan.activation.alpha,
        plan.activation.limit,
        plan.has_bias,
    )


def resident_bytes(plan: ModelPlan, weight_format: str, nodes: int = 1) -> int:
    """Bytes the weights of all layers take in `weight_format`, cut for so many memory nodes. Raises ModelError for a layer the
    engine cannot hold."""
    total = 0
    for layer in plan.layers:
        try:
            total += native.LayerWeights.nbytes_of(native_spec(layer), format_of(layer, weight_format), nodes)
        except native.InvalidArgument as error:
            raise ModelError(f"{layer.prefix}: {error}") from error
    return total


def format_of(layer: LayerPlan, weight_format: str) -> str:
    """The format a layer is held in: "auto" keeps the checkpoint's own."""
    return layer.form if weight_format == AUTO_FORMAT else weight_format


def shown_format(plan: ModelPlan, weight_format: str) -> str:
    """What the model is held in, in one word; formats joined by + where layers differ."""
    return plan.form if weight_format == AUTO_FORMAT else weight_format


def load_model(
    plan: ModelPlan, weight_format: str, progress: Callable[[int], None], placement: Placement = ONE_NODE
) -> BaseModel:
    """Reads every expert tensor once, keeps it or converts it to `weight_format`. `progress` receives what ModelPlan.bf16_bytes
    counts, as it becomes resident."""
    layers = {}
    for layer_plan in plan.layers:
        spec = native_spec(layer_plan)
        layers[layer_plan.layer] = LoadedLayer(layer_plan, spec, placement.weights(spec, format_of(layer_plan, weight_format)))
    # One file at a time, in file order: disks like it, and at most one file is open.
    wanted: dict[str, list[tuple[LoadedLayer, str, TensorInfo]]] = {}
    for layer in layers.values():
        for name, (file_name, info) in layer.plan.tensors.items():
            wanted.setdefault(file_name, []).append((layer, name, info))
    for file_name in sorted(wanted):
        with SafetensorsFile(plan.directory / file_name) as file:
            for layer, name, info in sorted(wanted[file_name], key=lambda entry: entry[2].begin):
                progress(_load_tensor(plan.directory, file, layer, name, info))
    return BaseModel(plan, layers)


def _load_tensor(directory: Path, file: SafetensorsFile, layer: LoadedLayer, name: str, info: TensorInfo) -> int:
    """Returns what ModelPlan.bf16_bytes counts for it. Raises ModelError for values the format cannot hold."""
    try:
        return _store_tensor(directory, file, layer, name, info)
    except native.InvalidArgument as error:
        raise ModelError(f"{layer.plan.prefix}{name}: {error}") from error


def _store_tensor(directory: Path, file: SafetensorsFile, layer: LoadedLayer, name: str, info: TensorInfo) -> int:
    naming = layer.plan.naming
    if naming.per_expert is not None:
        return _load_expert(directory, file, layer, name, info)
    if naming.scales is not None and name in naming.scales:
        return 0  # read with the codes
    if naming.biases is not None and name in naming.biases:
        _load_bias(file, layer, name == naming.biases[0], info)
        return info.size_bytes // FLOAT_BYTES[info.dtype] * FP32_BYTES
    if naming.fused is not None and naming.scales is not None:
        _load_blocks(directory, file, layer, name == naming.fused[0], info)
        return info.size_bytes * _CODES_A_BYTE * BF16_BYTES
    if naming.fused is not None:
        _load_fused(file, layer, name == naming.fused[0], info)
    return info.size_bytes // FLOAT_BYTES[info.dtype] * BF16_BYTES


def _load_expert(directory: Path, file: SafetensorsFile, layer: LoadedLayer, name: str, info: TensorInfo) -> int:
    if name.endswith(FP8_SCALE_SUFFIX):
        return 0  # read with the codes
    expert, templates = int(name.split(".")[1]), layer.plan.naming.per_expert or ("", "", "")
    projection = next(p for p, template in zip(_PROJECTIONS, templates, strict=True) if template.format(e=expert) == name)
    if layer.plan.form == "fp8":
        codes = np.empty(info.shape, np.uint8)
        file.read_into(info, 0, codes.data)
        with _beside(directory, file, layer, name + FP8_SCALE_SUFFIX) as (other, place):
            scales = _read_fp32(other, place)
        CodedMatrix("fp8", codes, scales).store(layer.weights, projection, expert, layer.plan.prefix + name)
        return info.size_bytes * BF16_BYTES
    source = np.empty(info.shape, np.uint16)
    _read_bf16(file, info, 0, source)
    layer.weights.set_matrix(projection, expert, source.reshape(-1))
    return info.size_bytes // FLOAT_BYTES[info.dtype] * BF16_BYTES


def _load_blocks(directory: Path, file: SafetensorsFile, layer: LoadedLayer, is_gate_up: bool, info: TensorInfo) -> None:
    """One expert at a time; rows of gate and up alternate."""
    names = layer.plan.naming.scales or ("", "")
    with _beside(directory, file, layer, names[0 if is_gate_up else 1]) as (other, place):
        all_scales = np.empty(place.shape, np.uint8)
        other.read_into(place, 0, all_scales.data)
    experts, rows = info.shape[:2]
    for expert in range(experts):
        codes = np.empty((rows, info.size_bytes // experts // rows), np.uint8)
        file.read_into(info, expert * codes.nbytes, codes.data)
        parts = (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))) if is_gate_up else (("down", slice(None)),)
        for projection, part in parts:
            matrix = CodedMatrix("mxfp4", codes[part], all_scales[expert, part])
            matrix.store(layer.weights, projection, expert, layer.plan.prefix + names[0 if is_gate_up else 1])


@contextmanager
def _beside(
    directory: Path, file: SafetensorsFile, layer: LoadedLayer, name: str
) -> Iterator[tuple[SafetensorsFile, TensorInfo]]:
    """Where scales lie: in most checkpoints in the same file as their codes."""
    file_name, info = layer.plan.tensors[name]
    if file.name == file_name:
        yield file, info
    else:
        with SafetensorsFile(directory / file_name) as other:
            yield other, info


def _load_fused(file: SafetensorsFile, layer: LoadedLayer, is_gate_up: bool, info: TensorInfo) -> None:
    """One expert at a time, through a buffer of one expert."""
    naming, weights = layer.plan.naming, layer.weights
    per_expert = info.size_bytes // layer.plan.num_experts
    for expert in range(layer.plan.num_experts):
        offset = expert * per_expert
        source = np.empty(info.shape[1:], np.uint16)
        _read_bf16(file, info, offset, source)
        if is_gate_up:
            weights.set_gate_up(expert, source.reshape(-1), naming.interleaved, naming.transposed)
        else:
            weights.set_down(expert, source.reshape(-1), naming.transposed)


def _load_bias(file: SafetensorsFile, layer: LoadedLayer, is_gate_up: bool, info: TensorInfo) -> None:
    values = _read_fp32(file, info)
    for expert in range(layer.plan.num_experts):
        if is_gate_up:
            layer.weights.set_gate_up_bias(expert, values[expert], layer.plan.naming.interleaved)
        else:
            layer.weights.bias("down", expert)[:] = values[expert]


def _read_bf16(file: SafetensorsFile, info: TensorInfo, offset: int, target: NDArray[np.uint16]) -> None:
    """Reads target.size elements from byte `offset` on; fp16 and fp32 checkpoints are rounded to nearest even."""
    if info.dtype == "BF16":
        file.read_into(info, offset, target.data)
        return
    source = np.empty(target.shape, np.float16 if info.dtype == "F16" else np.float32)
    file.read_into(info, offset, source.data)
    target[...] = round_to_bf16(source.astype(np.float32, copy=False))


def _read_fp32(file: SafetensorsFile, info: TensorInfo) -> NDArray[np.float32]:
    stored = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[info.dtype]
    source = np.empty(info.shape, stored)
    file.read_into(info, 0, source.data)
    if info.dtype == "BF16":
        return bf16_to_fp32(source.view(np.uint16))
    return source.astype(np.float32, copy=False)
