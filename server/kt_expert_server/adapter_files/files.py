"""Reading and writing an adapter's folder: adapter_config.json and safetensors, nothing that could carry code."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from kt_expert_server.adapter_files.lora import Array
from kt_expert_server.errors import InvalidRequest, ModelError
from kt_expert_server.model.bf16 import bf16_to_fp32
from kt_expert_server.model.safetensors_file import SafetensorsFile, TensorInfo

WEIGHTS_NAME, CONFIG_NAME, KT_KERNEL_NAME = (
    "adapter_model.safetensors", "adapter_config.json", "fused_expert_lora.safetensors",
)  # fmt: skip
PREFIX = "base_model.model."  # PEFT's, before the model's own names
_MAX_CONFIG_BYTES = 1 << 20
_REFUSED_OPTIONS = ("use_dora", "lora_bias", "use_qalora", "alora_invocation_tokens")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """One folder's contents. `tensors` are fp32, by their names in the file."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Array]
    kt_kernel: Mapping[str, Array]  # of kt-kernel's own file for experts

    def scale_and_rank(self, module: str) -> tuple[float, int]:
        """Of a module, by PEFT's rules: patterns match the end of its name, alpha over r or, with rslora, over its root."""
        rank = int(_by_pattern(self.config.get("rank_pattern"), module, self.config.get("r", 8)))
        alpha = float(_by_pattern(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank), rank

    @property
    def version(self) -> tuple[int, ...]:
        """PEFT's, that wrote it; () where it does not say."""
        return tuple(int(part) for part in re.findall(r"\d+", str(self.config.get("peft_version", "")))[:3])


def read_adapter(directory: Path) -> AdapterFiles:
    """Raises InvalidRequest for a folder without an adapter, or with one that is no plain LoRA."""
    path = directory / CONFIG_NAME
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InvalidRequest(f"{path} has {path.stat().st_size} bytes, expected at most {_MAX_CONFIG_BYTES}")
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{directory} has no {CONFIG_NAME} ({error.strerror}); give an adapter's folder") from error
    except ValueError as error:
        raise InvalidRequest(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        raise InvalidRequest(f"{path} is not of a LoRA adapter")
    for option in _REFUSED_OPTIONS:
        if config.get(option):
            raise InvalidRequest(f"{path} has {option}, which experts' LoRA does not have")
    weights, kt_kernel = directory / WEIGHTS_NAME, directory / KT_KERNEL_NAME
    if not weights.exists() and not kt_kernel.exists():
        raise InvalidRequest(f"{directory} has neither {WEIGHTS_NAME} nor {KT_KERNEL_NAME}; other kinds of files are not read")
    return AdapterFiles(config, _tensors(weights), _tensors(kt_kernel))


def read_fp32(file: SafetensorsFile, name: str, info: TensorInfo) -> Array:
    """One tensor. Raises InvalidRequest for a dtype that is not a plain floating-point one."""
    kinds = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    if info.dtype not in kinds:
        raise InvalidRequest(f"{file.name}: {name} is {info.dtype}, expected one of {', '.join(kinds)}")
    raw: NDArray[Any] = np.empty(info.shape, kinds[info.dtype])
    if raw.size:
        file.read_into(info, 0, raw.reshape(-1).view(np.uint8).data)
    return bf16_to_fp32(raw) if info.dtype == "BF16" else raw.astype(np.float32)


def write_adapter(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
    """Raises InvalidRequest where there is one already."""
    if (directory / CONFIG_NAME).exists():
        raise InvalidRequest(f"{directory} has an adapter already; give an empty folder")
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(values) for name, values in tensors.items()}, directory / WEIGHTS_NAME, {"format": "pt"}
    )
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _by_pattern(patterns: object, module: str, default: object) -> Any:
    for pattern, value in (patterns or {}).items():  # type: ignore[attr-defined]  # a JSON object
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _tensors(path: Path) -> dict[str, Array]:
    if not path.exists():
        return {}
    found: dict[str, Array] = {}
    try:
        with SafetensorsFile(path) as file:
            for name, info in file.tensors.items():
                found[name] = read_fp32(file, name, info)
    except ModelError as error:
        raise InvalidRequest(str(error)) from error
    return found
