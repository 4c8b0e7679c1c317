"""Writing an adapter in PEFT's fused form, which trainers go on with, from kt-kernel's folder or from names per expert.

PEFT (0.19.1 and later, tuners/lora/layer.py, ParamWrapper) has one A for gate and up. Where the two have an A of their own,
both stand in one matrix of twice the rank, and B has zeros where a half is the other's; alpha is doubled with it. kt-kernel's
extra experts (`lora_experts`) become modules that PEFT saves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from kt_expert_server.adapter_files.export import experts_of, others_of
from kt_expert_server.adapter_files.files import PREFIX, AdapterFiles
from kt_expert_server.adapter_files.lora import Array, ExpertMatrices, Layers
from kt_expert_server.adapter_files.matrices import DOWN, GATE_UP
from kt_expert_server.adapter_files.model import BaseOfAdapter
from kt_expert_server.errors import InvalidRequest

_WRITTEN_AS = "0.19.1"  # the first PEFT that takes A for [r * E, in]
_EXTRA = ".lora_experts."
_OF_FUSED = {GATE_UP: ("gate", "up"), DOWN: ("down",)}


def fused(files: AdapterFiles, base: BaseOfAdapter) -> tuple[dict[str, Any], dict[str, Array]]:
    """Configuration and tensors. Raises InvalidRequest for LoRA of some layers' experts only, or that differs in rank or scale
    from layer to layer."""
    extra = {key: values for key, values in files.tensors.items() if _EXTRA in key}
    plain = AdapterFiles(
        files.config, {key: files.tensors[key] for key in files.tensors.keys() - extra.keys()}, files.kt_kernel
    )
    layers, others = experts_of(plain, base), others_of(plain)
    if set(layers) != set(base.layers):
        missing = sorted(set(base.layers) - set(layers))
        raise InvalidRequest(
            f"the adapter has no LoRA of the experts in layers {missing}, and PEFT gives it to all that it names"
        )
    fused_names = [
        name for name, parts in _OF_FUSED.items() if any(part in layer for layer in layers.values() for part in parts)
    ]
    config: dict[str, Any] = dict(files.config) | {
        "peft_version": _WRITTEN_AS,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in others}),
        "target_parameters": [f"experts.{name}" for name in fused_names],
        "modules_to_save": [*(files.config.get("modules_to_save") or []), *({"lora_experts"} if extra else set())] or None,
    }
    tensors = dict(extra) | {
        f"{module}.lora_{side}.weight": values for module, (a, b, _) in others.items() for side, values in (("A", a), ("B", b))
    }
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name in fused_names:
        rank, scale = _put_fused(tensors, name, layers, base, is_alone=len(fused_names) == 1)
        ranks[f"experts.{name}"] = rank
        alphas[f"experts.{name}"] = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
    config["rank_pattern"] = ranks | (files.config.get("rank_pattern") or {})
    config["alpha_pattern"] = alphas | (files.config.get("alpha_pattern") or {})
    return config, tensors


def _put_fused(
    tensors: dict[str, Array], name: str, layers: Layers, base: BaseOfAdapter, *, is_alone: bool
) -> tuple[int, float]:
    """Adds the matrices of one fused parameter, of all layers. Returns their rank and scale."""
    pairs = {layer: _joined(name, layer, projections, base) for layer, projections in layers.items()}
    forms = {(pair.rank, pair.scale) for pair in pairs.values()}
    if len(forms) != 1:
        found = ", ".join(f"rank {rank} with scale {scale:g}" for rank, scale in sorted(forms))
        raise InvalidRequest(f"{name} has {found} in its layers, and PEFT's fused form has one for all")
    inner = ".base_layer" if name == GATE_UP and not is_alone else ""
    for layer, pair in pairs.items():
        path = f"{PREFIX}{base.fused_path(layer)}{inner}"
        tensors[f"{path}.lora_A.weight"] = pair.a.reshape(-1, pair.a.shape[2])
        tensors[f"{path}.lora_B.weight"] = pair.b.transpose(1, 2, 0).reshape(pair.b.shape[1], -1)
    return forms.pop()


def _joined(name: str, layer: int, projections: Mapping[str, ExpertMatrices], base: BaseOfAdapter) -> ExpertMatrices:
    """Of one layer: the fused parameter's A and B by expert."""
    found = [projections.get(part) for part in _OF_FUSED[name]]
    present = [each for each in found if each is not None]
    if len(present) != len(found):
        raise InvalidRequest(f"layer {layer} has LoRA of {sorted(projections)}, expected all of {', '.join(_OF_FUSED[name])}")
    if name == DOWN:
        return present[0]
    gate, up = present
    up_b = up.b * np.float32(up.scale / gate.scale)
    shared = gate.a.shape == up.a.shape and np.array_equal(gate.a, up.a)
    if shared:
        return ExpertMatrices(gate.a, _rows(gate.b, up_b, interleaved=base.interleaved), gate.scale)
    wide_gate, wide_up = np.pad(gate.b, ((0, 0), (0, 0), (0, up.rank))), np.pad(up_b, ((0, 0), (0, 0), (gate.rank, 0)))
    a = np.concatenate((gate.a, up.a), axis=1)
    return ExpertMatrices(a, _rows(wide_gate, wide_up, interleaved=base.interleaved), gate.scale)


def _rows(gate: Array, up: Array, *, interleaved: bool) -> Array:
    """gate and up [E, I, r] -> [E, 2I, r]."""
    if not interleaved:
        return np.concatenate((gate, up), axis=1)
    return np.stack((gate, up), axis=2).reshape(gate.shape[0], -1, gate.shape[2])
