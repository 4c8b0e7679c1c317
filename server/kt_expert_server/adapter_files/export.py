"""Writing an adapter with names per expert, which serving engines read, from PEFT's fused form or from kt-kernel's file.

Scales and ranks are made one for all: every B is multiplied with its own scale, every rank is filled up with zeros, and the
configuration says alpha = r. So no reader's rules about patterns or rslora matter. gpt-oss keeps the fused form, the only one
vLLM reads of it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from kt_expert_server.adapter_files.files import PREFIX, AdapterFiles
from kt_expert_server.adapter_files.keys import expert_keys
from kt_expert_server.adapter_files.lora import PROJECTIONS, Array, ExpertMatrices, Layers
from kt_expert_server.adapter_files.model import BaseOfAdapter
from kt_expert_server.adapter_files.readers import peft
from kt_expert_server.errors import InvalidRequest

_KT_KERNEL = re.compile(r"layers\.(\d+)\.experts\.(gate|up|down)_lora_([ab])")
_LORA_KEY = re.compile(r"(.*)\.lora_([AB])\.weight")


def experts_of(files: AdapterFiles, base: BaseOfAdapter) -> Layers:
    """The experts' LoRA as it was trained. Raises InvalidRequest where PEFT would not read all of it, or there is none."""
    reading = peft(files, base)
    if reading.refused or reading.dropped:
        raise InvalidRequest(f"PEFT does not read all of it: {reading.refused or ', '.join(reading.dropped[:3])}")
    layers = reading.layers | _of_kt_kernel(files, base)
    if not layers:
        raise InvalidRequest("the adapter has no LoRA of experts")
    return layers


def per_expert(files: AdapterFiles, base: BaseOfAdapter) -> tuple[dict[str, Any], dict[str, Array]]:
    """Configuration and tensors. Raises InvalidRequest for an adapter that cannot be written so."""
    if base.is_fused_in_vllm:
        raise InvalidRequest(f"{base.model_type} is served from PEFT's fused form, as it is; nothing is to be exported")
    if not base.is_served_with_lora:
        raise InvalidRequest(
            f"no serving engine is known to read LoRA on {base.model_type}'s experts; merge the adapter: "
            "kt-expert checkpoint merge"
        )
    layers, others = experts_of(files, base), others_of(files)
    rank = max(
        [each.rank for layer in layers.values() for each in layer.values()] + [a.shape[0] for a, _, _ in others.values()]
    )
    tensors: dict[str, Array] = {}
    for module, (a, b, scale) in others.items():
        _put(tensors, module, *_filled(a, b * np.float32(scale), rank))
    for layer, projections in layers.items():
        for projection, name in zip(PROJECTIONS, base.names, strict=True):
            matrices = projections.get(projection) or _zero(base, layer, projection, rank)
            for expert in range(base.layers[layer].experts):
                a, b = matrices.a[expert], matrices.b[expert] * np.float32(matrices.scale)
                _put(tensors, f"{PREFIX}{base.path(layer)}.{expert}.{name}", *_filled(a, b, rank))
    modules = sorted({module.rsplit(".", 1)[-1] for module in others} | set(base.names))
    changed = {
        "r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.0,
        "target_modules": modules, "target_parameters": None,
    }  # fmt: skip
    return dict(files.config) | changed, tensors


def others_of(files: AdapterFiles) -> dict[str, tuple[Array, Array, float]]:
    """LoRA of modules beside the experts: A, B and scale by module. Raises InvalidRequest for tensors that are no LoRA."""
    experts = {each.key for each in expert_keys(files.tensors)}
    sides: dict[str, dict[str, Array]] = {}
    for key in files.tensors.keys() - experts:
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            raise InvalidRequest(f"{key} is no LoRA matrix; adapters with modules of their own are not exported")
        sides.setdefault(match[1], {})[match[2]] = files.tensors[key]
    found = {}
    for module, matrices in sides.items():
        scale, rank = files.scale_and_rank(module.removeprefix(PREFIX))
        if set(matrices) != {"A", "B"} or matrices["A"].shape[0] != rank:
            raise InvalidRequest(f"{module} has LoRA {sorted(matrices)}, expected A and B of rank {rank}")
        found[module] = (matrices["A"], matrices["B"], scale)
    return found


def _of_kt_kernel(files: AdapterFiles, base: BaseOfAdapter) -> Layers:
    """fused_expert_lora.safetensors: a and b of each projection as [E, r, in] and [E, out, r], with gate's and up's own A."""
    sides: dict[int, dict[str, dict[str, Array]]] = {}
    for key, values in files.kt_kernel.items():
        match = _KT_KERNEL.fullmatch(key)
        if match is None or int(match[1]) not in base.layers:
            raise InvalidRequest(f"kt-kernel's file has {key}, expected layers.N.experts.gate_lora_a and such")
        sides.setdefault(int(match[1]), {}).setdefault(match[2], {})[match[3]] = values
    found: Layers = {}
    for layer, projections in sides.items():
        for projection, pair in projections.items():
            sizes = base.layers[layer]
            if set(pair) != {"a", "b"} or pair["a"].ndim != 3 or pair["a"].shape[0] != sizes.experts:
                raise InvalidRequest(
                    f"kt-kernel's file has {projection} of layer {layer} without a and b of {sizes.experts} experts"
                )
            scale, _ = files.scale_and_rank(f"{base.path(layer)}.{projection}_proj")
            found.setdefault(layer, {})[projection] = ExpertMatrices(pair["a"], pair["b"], scale)
    return found


def _zero(base: BaseOfAdapter, layer: int, projection: str, rank: int) -> ExpertMatrices:
    """Engines ask for all three projections: one without LoRA gets some that adds nothing."""
    sizes = base.layers[layer]
    inputs, outputs = (sizes.hidden, sizes.intermediate) if projection != "down" else (sizes.intermediate, sizes.hidden)
    return ExpertMatrices(
        np.zeros((sizes.experts, rank, inputs), np.float32), np.zeros((sizes.experts, outputs, rank), np.float32), 1.0
    )  # fmt: skip


def _filled(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    more = rank - a.shape[0]
    return np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))


def _put(tensors: dict[str, Array], module: str, a: Array, b: Array) -> None:
    tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
