"""Tensors of a checkpoint as fp32 matrices, one expert at a time, be they floating-point numbers or codes with scales."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kt_expert_server.adapter_files.files import read_fp32
from kt_expert_server.adapter_files.lora import Array
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.architecture import FP8_SCALE_SUFFIX
from kt_expert_server.model.bf16 import bf16_to_fp32, round_to_bf16
from kt_expert_server.model.encoding import encode_fp8, encode_mxfp4, rescaled
from kt_expert_server.model.index import ModelPlan, tensor_index
from kt_expert_server.model.quantised import MXFP4_GROUP, CodedMatrix, scale_shape
from kt_expert_server.model.safetensors_file import FLOAT_BYTES, SafetensorsFile, TensorInfo

_BLOCKS_SUFFIX = "_blocks"  # of gpt-oss's codes
_FP8 = "F8_E4M3"
_STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, _FP8: np.uint8, "U8": np.uint8}


@dataclass(frozen=True, slots=True)
class Codes:
    """A tensor of codes: its form, the tensor of its scales, and what it is without codes, [E, in, out] for gpt-oss."""

    form: str
    scales: str
    plain_name: str
    plain_shape: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        return self.form == "mxfp4"


class CheckpointTensors:
    """Of one checkpoint; its files stay open. Raises InvalidRequest for codes that are not understood."""

    def __init__(self, plan: ModelPlan) -> None:
        self._directory: Path = plan.directory
        self.index = tensor_index(plan.directory)
        self.codes = self._find_codes(plan)
        self.scales = {codes.scales: name for name, codes in self.codes.items()}
        self._open: dict[str, SafetensorsFile] = {}
        self._stack = ExitStack()

    def __enter__(self) -> CheckpointTensors:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def matrices(self, name: str) -> int:
        """How many matrices a tensor has: one, or one for each expert."""
        shape = self.index[name][1].shape
        return shape[0] if len(shape) > 2 else 1

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Of one matrix as matrix() gives it."""
        codes, shape = self.codes.get(name), self.index[name][1].shape
        if codes is not None and codes.form == "mxfp4":
            return shape[1], shape[2] * MXFP4_GROUP
        rows, columns = shape[-2:] if len(shape) > 1 else (1, *shape)
        return rows, columns

    def require_readable(self, name: str) -> None:
        """Raises InvalidRequest for a tensor that is neither floating-point nor known codes."""
        file, info = self.index[name]
        if name not in self.codes and info.dtype not in FLOAT_BYTES:
            raise InvalidRequest(f"{name} in {file} is {info.dtype}, which is not merged into; {', '.join(FLOAT_BYTES)} are")

    def matrix(self, name: str, number: int) -> Array:
        """As it lies in the file, but decoded: codes are [out, in]. Raises InvalidRequest for values that are not finite."""
        codes, file = self.codes.get(name), self._file(name)
        info = self.index[name][1]
        values = read_fp32(file, name, _part(info, number)) if codes is None else self._decoded(name, codes, number)
        if not np.isfinite(values).all():
            raise InvalidRequest(f"{name} in {file.name} has values that are not finite, in matrix {number}")
        return values

    def encode(self, name: str, number: int, values: Array) -> CodedMatrix:
        """One matrix in the tensor's own form. A block of fp8 whose values still fit keeps its scale; another gets one of the
        dtype, and of the kind, that the checkpoint has: powers of two, or any."""
        codes = self.codes[name]
        if codes.form == "mxfp4":
            return encode_mxfp4(values)
        info = _part(self.index[codes.scales][1], number)
        return encode_fp8(values, rescaled(values, self._scales(codes.scales, info), lambda new: _narrowed(new, info.dtype)))

    def scale_bytes(self, name: str, coded: CodedMatrix) -> bytes:
        """Scales as the checkpoint has them."""
        dtype = self.index[self.codes[name].scales][1].dtype
        if dtype == "BF16":
            return round_to_bf16(np.asarray(coded.scales, np.float32)).tobytes()
        return coded.scales.astype(_STORED[dtype]).tobytes()

    def _decoded(self, name: str, codes: Codes, number: int) -> Array:
        info, place = _part(self.index[name][1], number), _part(self.index[codes.scales][1], number)
        bits = self._raw(name, info)
        if codes.form == "mxfp4":
            return CodedMatrix("mxfp4", bits.reshape(len(bits), -1), self._raw(codes.scales, place)).decode()
        return CodedMatrix("fp8", bits, self._scales(codes.scales, place)).decode()

    def _scales(self, name: str, place: TensorInfo) -> Array:
        return read_fp32(self._file(name), name, place)

    def _raw(self, name: str, info: TensorInfo) -> NDArray[Any]:
        raw: NDArray[Any] = np.empty(info.shape, _STORED[info.dtype])
        self._file(name).read_into(info, 0, raw.reshape(-1).view(np.uint8).data)
        return raw

    def _file(self, name: str) -> SafetensorsFile:
        file = self.index[name][0]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(SafetensorsFile(self._directory / file))
        return self._open[file]

    def _find_codes(self, plan: ModelPlan) -> dict[str, Codes]:
        found = {}
        for name, (file, info) in self.index.items():
            scales = name + FP8_SCALE_SUFFIX
            if info.dtype != _FP8 or scales not in self.index:
                continue
            expected, got = scale_shape("fp8", *info.shape), self.index[scales][1]
            if got.shape != expected or got.dtype not in ("F32", "F16", "BF16"):
                raise InvalidRequest(f"{scales} in {file} is {got.dtype} {got.shape}, expected floating-point {expected}")
            found[name] = Codes("fp8", scales, name, info.shape)
        for layer in plan.layers:
            pairs = zip(layer.naming.fused or (), layer.naming.scales or (), strict=False)
            for blocks, scales in pairs:
                experts, rows, groups, _ = self.index[layer.prefix + blocks][1].shape
                plain = layer.prefix + blocks.removesuffix(_BLOCKS_SUFFIX)
                shape = (experts, groups * MXFP4_GROUP, rows)
                found[layer.prefix + blocks] = Codes("mxfp4", layer.prefix + scales, plain, shape)
        return found

    def require_decodable(self) -> None:
        """Raises InvalidRequest for a tensor of codes whose scales are not known."""
        for name, (file, info) in self.index.items():
            if info.dtype.startswith("F8") and name not in self.codes:
                raise InvalidRequest(f"{name} in {file} is {info.dtype} and has no {name}{FP8_SCALE_SUFFIX} beside it")


def _part(info: TensorInfo, number: int) -> TensorInfo:
    """The matrix of one expert; all of a tensor that has one."""
    if len(info.shape) <= 2:
        return info
    size = info.size_bytes // info.shape[0]
    return TensorInfo(info.dtype, info.shape[1:], info.begin + number * size, size)


def _narrowed(scales: Array, dtype: str) -> Array:
    if dtype == "BF16":
        return bf16_to_fp32(round_to_bf16(scales))
    return scales.astype(_STORED[dtype]).astype(np.float32)
