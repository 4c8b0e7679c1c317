"""Writing a model with an adapter merged into it, in the checkpoint's own layout and dtypes, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from crc32c import crc32c

from kt_expert_server.adapter_files.export import experts_of, others_of
from kt_expert_server.adapter_files.files import PREFIX, AdapterFiles, read_fp32
from kt_expert_server.adapter_files.lora import Array, ExpertMatrices
from kt_expert_server.adapter_files.model import base_of_plan
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.bf16 import round_to_bf16
from kt_expert_server.model.index import LayerPlan, ModelPlan, plan_model
from kt_expert_server.model.safetensors_file import SafetensorsFile, TensorInfo

_PIECE_BYTES = 64 * 1024 * 1024  # of a tensor that is copied as it is
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class _Change:
    """What is added to one tensor: scale * b @ a, or for a fused one that of each expert."""

    plan: LayerPlan | None
    projections: Mapping[str, ExpertMatrices]
    expert: int | None = None

    def add_to(self, values: Array) -> Array:
        if self.expert is not None:
            (matrices,) = self.projections.values()
            return values + _product(matrices, self.expert)
        assert self.plan is not None  # noqa: S101  # a fused tensor is a layer's
        for expert in range(values.shape[0]):
            target = values[expert].T if self.plan.naming.transposed else values[expert]  # [out, in]
            for projection, matrices in self.projections.items():
                target[_rows(projection, target.shape[0], interleaved=self.plan.naming.interleaved)] += _product(
                    matrices, expert
                )
        return values


def merge(files: AdapterFiles, model: Path, out: Path) -> int:
    """Writes the merged model to an empty folder and reads what was changed back. Returns how many tensors were changed.

    Raises InvalidRequest for a quantised model, for LoRA on something that the checkpoint does not have, or where what is read
    back is not what was written.
    """
    plan = plan_model(model)
    if plan.form != "bf16":
        raise InvalidRequest(f"{model} holds its experts as {plan.form}; merge into a checkpoint in bf16, fp16 or fp32")
    if out.exists() and any(out.iterdir()):
        raise InvalidRequest(f"{out} is not empty; give a new folder")
    changes = _changes(files, plan)
    shards = sorted(path for path in model.glob("*.safetensors"))
    there = {name for shard in shards for name in _names(shard)}
    missing = sorted(set(changes) - there)
    if missing:
        raise InvalidRequest(f"the adapter changes {missing[0]}, which {model} does not have; {len(missing)} such in all")
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    for shard in shards:
        written = _write_shard(shard, out / shard.name, changes)
        _read_back(out / shard.name, written)
    return len(changes)


def _changes(files: AdapterFiles, plan: ModelPlan) -> dict[str, _Change]:
    """By the checkpoint's names."""
    trained, changes = experts_of(files, base_of_plan(plan)), {}
    for layer in plan.layers:
        projections = trained.get(layer.layer, {})
        naming = layer.naming
        if naming.per_expert is not None:
            for projection, name in zip(("gate", "up", "down"), naming.per_expert, strict=True):
                if projection in projections:
                    own = {projection: projections[projection]}
                    for expert in range(layer.num_experts):
                        changes[layer.prefix + name.format(e=expert)] = _Change(layer, own, expert)
        elif naming.fused is not None:
            for name, members in ((naming.fused[0], ("gate", "up")), (naming.fused[1], ("down",))):
                present = {projection: projections[projection] for projection in members if projection in projections}
                if present:
                    changes[layer.prefix + name] = _Change(layer, present)
    for module, (a, b, scale) in others_of(files).items():
        matrices = ExpertMatrices(a[None], b[None], scale)
        changes[f"{module.removeprefix(PREFIX)}.weight"] = _Change(None, {"weight": matrices}, 0)
    return changes


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


def _names(shard: Path) -> list[str]:
    with SafetensorsFile(shard) as file:
        return list(file.tensors)


def _write_shard(source: Path, target: Path, changes: Mapping[str, _Change]) -> dict[str, int]:
    """The same tensors in the same order; returns checksums of those that were changed. Format:
    https://github.com/huggingface/safetensors, "Format"."""
    checksums = {}
    with SafetensorsFile(source) as file, target.open("xb") as stream:
        ordered = sorted(file.tensors.items(), key=lambda entry: entry[1].begin)
        _write_header(stream, ordered)
        for name, info in ordered:
            if name in changes:
                merged = _encoded(changes[name].add_to(read_fp32(file, name, info)), info.dtype)
                checksums[name] = crc32c(merged)
                stream.write(merged)
            else:
                for piece in _pieces(file, info):
                    stream.write(piece)
    return checksums


def _write_header(stream: BinaryIO, ordered: list[tuple[str, TensorInfo]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, info in ordered:
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, begin + info.size_bytes]}
        begin += info.size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)


def _pieces(file: SafetensorsFile, info: TensorInfo) -> Iterator[memoryview]:
    for begin in range(0, info.size_bytes, _PIECE_BYTES):
        piece = memoryview(bytearray(min(_PIECE_BYTES, info.size_bytes - begin)))
        file.read_into(info, begin, piece)
        yield piece


def _encoded(values: Array, dtype: str) -> bytes:
    if dtype == "BF16":
        return round_to_bf16(values).tobytes()
    return values.astype(np.float32 if dtype == "F32" else np.float16).tobytes()


def _read_back(path: Path, checksums: Mapping[str, int]) -> None:
    with SafetensorsFile(path) as file:
        for name, checksum in checksums.items():
            got = 0
            for piece in _pieces(file, file.tensors[name]):
                got = crc32c(piece, got)
            if got != checksum:
                raise InvalidRequest(f"{name} in {path} is not what was written; is the disk sound?")
