"""Writing a model with an adapter merged into it, in the checkpoint's own layout and dtypes, one matrix at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kt_expert_server.adapter_files.coded import CheckpointTensors
from kt_expert_server.adapter_files.export import experts_of, others_of
from kt_expert_server.adapter_files.files import PREFIX, AdapterFiles
from kt_expert_server.adapter_files.lora import Array, ExpertMatrices
from kt_expert_server.adapter_files.model import base_of_plan
from kt_expert_server.adapter_files.rewrite import INDEX_NAME, Written, write_index, write_shard
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.architecture import Naming
from kt_expert_server.model.bf16 import round_to_bf16
from kt_expert_server.model.index import LayerPlan, ModelPlan, plan_model
from kt_expert_server.model.safetensors_file import TensorInfo

DEQUANTIZE, REQUANTIZE = "dequantize", "requantize"
_CONFIG_NAME = "config.json"


@dataclass(slots=True)
class Merged:
    """How many tensors the adapter changed and, of those that were rounded to codes, sums of squares of what it changed, of the
    rounding, and of the values."""

    changed: int
    change: float = 0.0
    rounding: float = 0.0
    values: float = 0.0

    def about_rounding(self) -> str:
        """A sentence; empty where nothing was rounded to codes."""
        if not self.values:
            return ""
        rounding, change = (math.sqrt(each / self.values) for each in (self.rounding, self.change))
        return f"rounding to codes changed the weights by {rounding:.2%} of their norm, the adapter by {change:.2%}"


@dataclass(frozen=True, slots=True)
class _Change:
    """What is added to one tensor: scale * b @ a, or for a fused one that of each expert."""

    naming: Naming | None
    projections: Mapping[str, ExpertMatrices]
    expert: int | None = None  # whose tensor it is

    def require_fit(self, name: str, shape: tuple[int, int]) -> None:
        """Raises InvalidRequest for LoRA of another size than the tensor's matrices, [out, in] or as the naming turns them, and
        for values that are not finite."""
        rows, columns = reversed(shape) if self.naming is not None and self.naming.transposed else shape
        for projection, matrices in self.projections.items():
            is_fused = self.naming is not None and self.expert is None and projection != "down"
            got = (matrices.b.shape[1], matrices.a.shape[2])
            if got != ((rows // 2) if is_fused else rows, columns):
                raise InvalidRequest(f"the adapter has LoRA of {list(got)} for {name}, whose matrices are {[rows, columns]}")
            if not (np.isfinite(matrices.a).all() and np.isfinite(matrices.b).all()):
                raise InvalidRequest(f"the adapter's LoRA for {name} has values that are not finite")

    def add_to(self, matrix: Array, number: int) -> None:
        """To one matrix [out, in], in place."""
        if self.expert is not None or self.naming is None:
            (matrices,) = self.projections.values()
            matrix += _product(matrices, self.expert or 0)
            return
        for projection, matrices in self.projections.items():
            rows = _rows(projection, matrix.shape[0], interleaved=self.naming.interleaved)
            matrix[rows] += _product(matrices, number)


def merge(files: AdapterFiles, model: Path, out: Path, quantized: str = "") -> Merged:
    """Writes the merged model to a new folder, beside which it grows, and reads what was changed back. `quantized` says what
    becomes of a checkpoint in fp8 or mxfp4: "dequantize" writes all of it in bf16, "requantize" rounds what was changed to
    codes again. Returns what was changed.

    Raises InvalidRequest, and leaves nothing, where that is not said or means nothing, for LoRA that does not fit the
    checkpoint, or where what is read back is not what was written.
    """
    plan = plan_model(model)
    if out.exists() and any(out.iterdir()):
        raise InvalidRequest(f"{out} is not empty; give a new folder")
    partial = out.with_name(f"{out.name}.partial")
    with CheckpointTensors(plan) as tensors:
        changes = _changes(files, plan)
        _check(plan, tensors, changes, quantized)
        if partial.exists():
            raise InvalidRequest(f"{partial} is there, perhaps of a merge that was broken off; remove it")
        partial.mkdir(parents=True)
        try:
            merged = _write(tensors, changes, plan.directory, partial, decodes=quantized == DEQUANTIZE)
        except BaseException:
            shutil.rmtree(partial)
            raise
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return merged


def _write(tensors: CheckpointTensors, changes: Mapping[str, _Change], model: Path, out: Path, *, decodes: bool) -> Merged:
    _copy_other_files(model, out, keeps_quantisation=not decodes)
    writer = _Writer(tensors, changes, Merged(len(changes)), decodes)
    shards = sorted({file for file, _ in tensors.index.values()})
    sizes = {shard: write_shard(model / shard, out / shard, writer.rewrite) for shard in shards}
    if decodes and (out / INDEX_NAME).exists():
        write_index(out, sizes)
    return writer.merged


def _check(plan: ModelPlan, tensors: CheckpointTensors, changes: Mapping[str, _Change], quantized: str) -> None:
    """Raises InvalidRequest before anything is written."""
    missing = sorted(set(changes) - set(tensors.index))
    if missing:
        raise InvalidRequest(
            f"the adapter changes {missing[0]}, which {plan.directory} does not have; {len(missing)} such in all"
        )
    if not tensors.codes and quantized:
        raise InvalidRequest(f"{plan.directory} is not quantised; there is nothing to {quantized}")
    if tensors.codes and quantized not in (DEQUANTIZE, REQUANTIZE):
        forms = "+".join(sorted({codes.form for codes in tensors.codes.values()}))
        raise InvalidRequest(
            f"{plan.directory} holds tensors as {forms}; say {DEQUANTIZE}, to write all of it in bf16, or {REQUANTIZE}, to "
            f"round merged weights to {forms} again"
        )
    if quantized == DEQUANTIZE:
        tensors.require_decodable()
    for name, change in changes.items():
        tensors.require_readable(name)
        change.require_fit(name, tensors.matrix_shape(name))


def _copy_other_files(model: Path, out: Path, *, keeps_quantisation: bool) -> None:
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    if not keeps_quantisation:
        config = json.loads((model / _CONFIG_NAME).read_bytes())
        config.pop("quantization_config", None)
        (out / _CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _changes(files: AdapterFiles, plan: ModelPlan) -> dict[str, _Change]:
    """By the checkpoint's names."""
    trained = experts_of(files, base_of_plan(plan))
    changes: dict[str, _Change] = {}
    for layer in plan.layers:
        changes |= _of_layer(layer, trained.get(layer.layer, {}))
    for module, (a, b, scale) in others_of(files).items():
        matrices = ExpertMatrices(a[None], b[None], scale)
        changes[f"{module.removeprefix(PREFIX)}.weight"] = _Change(None, {"weight": matrices})
    return changes


def _of_layer(layer: LayerPlan, projections: Mapping[str, ExpertMatrices]) -> dict[str, _Change]:
    naming = layer.naming
    changes: dict[str, _Change] = {}
    if naming.per_expert is not None:
        for projection, name in zip(("gate", "up", "down"), naming.per_expert, strict=True):
            if projection in projections:
                own = {projection: projections[projection]}
                for expert in range(layer.num_experts):
                    changes[layer.prefix + name.format(e=expert)] = _Change(naming, own, expert)
    elif naming.fused is not None:
        for name, members in ((naming.fused[0], ("gate", "up")), (naming.fused[1], ("down",))):
            present = {projection: projections[projection] for projection in members if projection in projections}
            if present:
                changes[layer.prefix + name] = _Change(naming, present)
    return changes


@dataclass(frozen=True, slots=True)
class _Writer:
    """Says what each tensor becomes."""

    tensors: CheckpointTensors
    changes: Mapping[str, _Change]
    merged: Merged
    decodes: bool
    _scales: dict[str, list[bytes]] = field(default_factory=dict)  # of codes that were written, until theirs are

    def rewrite(self, name: str, info: TensorInfo) -> Written | None:
        copied = Written(name, info.dtype, info.shape)
        codes_name = self.tensors.scales.get(name)
        if codes_name is not None:
            if self.decodes:
                return None
            is_changed = codes_name in self.changes
            return Written(name, info.dtype, info.shape, lambda: self._scales_of(codes_name)) if is_changed else copied
        codes = self.tensors.codes.get(name)
        if codes is not None and self.decodes:
            return Written(codes.plain_name, "BF16", codes.plain_shape, lambda: self._decoded(name))
        if name not in self.changes:
            return copied
        return Written(name, info.dtype, info.shape, lambda: self._plain(name) if codes is None else self._coded(name))

    def _plain(self, name: str) -> Iterator[bytes]:
        change, dtype = self.changes[name], self.tensors.index[name][1].dtype
        transposed = change.naming is not None and change.naming.transposed
        for number in range(self.tensors.matrices(name)):
            values = self.tensors.matrix(name, number)
            change.add_to(values.T if transposed else values, number)
            yield _as_bytes(name, values, dtype)

    def _decoded(self, name: str) -> Iterator[bytes]:
        change, transposed = self.changes.get(name), self.tensors.codes[name].transposed
        for number in range(self.tensors.matrices(name)):
            values = self.tensors.matrix(name, number)
            if change is not None:
                change.add_to(values, number)
            yield _as_bytes(name, values.T if transposed else values, "BF16")

    def _coded(self, name: str) -> Iterator[bytes]:
        self._scales[name] = []
        for number in range(self.tensors.matrices(name)):
            before = self.tensors.matrix(name, number)
            values = before.copy()
            self.changes[name].add_to(values, number)
            _require_finite(name, values)
            coded = self.tensors.encode(name, number, values)
            self._scales[name].append(self.tensors.scale_bytes(name, coded))
            self.merged.change += _square(values - before)
            self.merged.rounding += _square(coded.decode() - values)
            self.merged.values += _square(values)
            yield coded.codes.tobytes()

    def _scales_of(self, name: str) -> Iterator[bytes]:
        """Where they lie before their codes, those are made twice."""
        if name not in self._scales:
            counted = (self.merged.change, self.merged.rounding, self.merged.values)
            for _ in self._coded(name):
                pass
            self.merged.change, self.merged.rounding, self.merged.values = counted
        yield from self._scales.pop(name)


def _square(values: Array) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _product(matrices: ExpertMatrices, expert: int) -> Array:
    product: Array = (matrices.b[expert] @ matrices.a[expert]) * np.float32(matrices.scale)
    return product


def _rows(projection: str, rows: int, *, interleaved: bool) -> slice:
    """Of gate or up in a fused gate_up; all of down."""
    if projection == "down":
        return slice(0, rows)
    if interleaved:
        return slice(0 if projection == "gate" else 1, rows, 2)
    return slice(0, rows // 2) if projection == "gate" else slice(rows // 2, rows)


def _require_finite(name: str, values: Array) -> None:
    if not np.isfinite(values).all():
        raise InvalidRequest(f"{name} with the adapter in it has values that are not finite")


def _as_bytes(name: str, values: Array, dtype: str) -> bytes:
    _require_finite(name, values)
    if dtype == "BF16":
        return round_to_bf16(values).tobytes()
    return values.astype(np.float32 if dtype == "F32" else np.float16).tobytes()
