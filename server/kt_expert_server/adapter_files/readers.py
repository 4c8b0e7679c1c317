"""How PEFT, vLLM and SGLang read LoRA of experts, with what they refuse and what they drop without a word.

Rules as of PEFT 0.21.2 (tuners/lora/layer.py, utils/transformers_weight_conversion.py), vLLM 0.33.0 (lora/lora_model.py,
lora/model_manager.py, lora/lora_weights.py, lora/peft_helper.py) and SGLang 0.5.23 (srt/lora/lora.py, srt/lora/mem_pool.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from kt_expert_server.adapter_files.files import PREFIX, AdapterFiles
from kt_expert_server.adapter_files.keys import PROJECTION_OF, ExpertKey, expert_keys
from kt_expert_server.adapter_files.lora import ExpertMatrices, Layers, Reading
from kt_expert_server.adapter_files.matrices import (
    DOWN,
    GATE_UP,
    Pairs,
    fused_pairs,
    per_expert_pairs,
    split_gate_up,
    with_scale,
)
from kt_expert_server.adapter_files.model import BaseOfAdapter
from kt_expert_server.errors import InvalidRequest

Reader = Callable[[AdapterFiles, BaseOfAdapter], Reading]


def by_layer(files: AdapterFiles, base: BaseOfAdapter) -> Iterator[tuple[int, list[ExpertKey]]]:
    """Raises InvalidRequest for a layer the model has no experts in."""
    keys = expert_keys(files.tensors)
    for layer in sorted({each.layer for each in keys}):
        if layer not in base.layers:
            raise InvalidRequest(f"the adapter has experts in layer {layer}, the model has none there")
        yield layer, [each for each in keys if each.layer == layer]


def read_fused(keys: list[ExpertKey], files: AdapterFiles, base: BaseOfAdapter) -> dict[str, ExpertMatrices]:
    """One layer, by PEFT's rules. Raises InvalidRequest for a rank that the configuration does not give."""
    matrices: dict[str, ExpertMatrices] = {}
    for name, (a, b) in fused_pairs(keys, files, base).items():
        scale, rank = files.scale_and_rank(f"{keys[0].path}.{name}")
        if a.shape[1] != rank:
            raise InvalidRequest(f"{keys[0].path}.{name} has rank {a.shape[1]}, the configuration says {rank}")
        pairs = split_gate_up(a, b, interleaved=base.interleaved) if name == GATE_UP else {"down": (a, b)}
        matrices |= with_scale(pairs, dict.fromkeys(pairs, scale))
    return matrices


def peft(files: AdapterFiles, base: BaseOfAdapter) -> Reading:
    """The fused form as it is; names per expert where PEFT converts the family's, with gate and up side by side in one matrix
    of twice the rank and, in error, rslora's root of that."""
    layers: Layers = {}
    dropped: list[str] = []
    for layer, keys in by_layer(files, base):
        if keys[0].expert is None:
            layers[layer] = read_fused(keys, files, base)
        elif not base.converts_per_expert:
            dropped += [each.key for each in keys]
        else:
            pairs, missing = per_expert_pairs(keys, files, base.layers[layer].experts)
            if missing:
                return Reading(refused=f"layer {layer} lacks {sorted(missing)[0]}, and PEFT converts whole layers")
            scales = _scales(keys, pairs, files)
            if files.config.get("use_rslora"):
                scales |= {name: scales[name] * math.sqrt(2.0) for name in ("gate", "up")}
            layers[layer] = with_scale(pairs, scales)
    return Reading(layers, tuple(dropped))


def vllm(files: AdapterFiles, base: BaseOfAdapter) -> Reading:
    """Names per expert, whole layers of them, at the paths of its own model; gpt-oss fused, with both parameters. What lies at
    another path passes its check and is never used."""
    if not base.is_served_with_lora:
        return Reading(refused=f"it has no LoRA on {base.model_type}'s experts")
    layers: Layers = {}
    dropped: list[str] = []
    for layer, keys in by_layer(files, base):
        is_fused = keys[0].expert is None
        if is_fused and not base.is_fused_in_vllm:
            if all(each.inner for each in keys):
                dropped += [each.key for each in keys]
                continue
            return Reading(refused=f"it reads names per expert for {base.model_type}, and the adapter is fused")
        if not is_fused and base.is_fused_in_vllm:
            return Reading(refused=f"it reads the fused form for {base.model_type}, and the adapter has names per expert")
        if any(each.path != base.path(layer) or not each.key.startswith(PREFIX) for each in keys):
            dropped += [each.key for each in keys]
        elif is_fused:
            if set(fused_pairs(keys, files, base)) != {GATE_UP, DOWN} or not any(each.inner for each in keys):
                return Reading(refused=f"layer {layer} has LoRA of one parameter, and it needs gate_up and down")
            layers[layer] = read_fused(keys, files, base)
        else:
            pairs, missing = per_expert_pairs(keys, files, base.layers[layer].experts)
            if missing:
                return Reading(refused=f"layer {layer} lacks {sorted(missing)[0]}, and it needs every expert's")
            layers[layer] = with_scale(pairs, _scales(keys, pairs, files))
    return Reading(layers, tuple(dropped))


def sglang(files: AdapterFiles, base: BaseOfAdapter) -> Reading:
    """Names per expert; alpha over r for all of them, without rslora and patterns. What is missing is zero."""
    if not base.is_served_with_lora:
        return Reading(refused=f"it has no LoRA on {base.model_type}'s experts")
    layers: Layers = {}
    rank = int(files.config.get("r", 8))
    scale = float(files.config.get("lora_alpha", 8)) / rank
    for layer, keys in by_layer(files, base):
        if keys[0].expert is None:
            return Reading(refused="it reads names per expert, and the adapter is fused")
        pairs, _ = per_expert_pairs(keys, files, base.layers[layer].experts)
        if any(a.shape[1] != rank for a, _ in pairs.values()):
            return Reading(refused=f"layer {layer} has another rank than the configuration's r, {rank}")
        if "up" in pairs and "gate" not in pairs:
            return Reading(refused=f"layer {layer} has LoRA on up and none on gate")
        layers[layer] = with_scale(pairs, dict.fromkeys(pairs, scale))
    return Reading(layers)


def _scales(keys: list[ExpertKey], pairs: Pairs, files: AdapterFiles) -> dict[str, float]:
    """By projection, as the configuration gives them for the names in the file."""
    names = {PROJECTION_OF[each.name]: each.name for each in keys if each.name in PROJECTION_OF}
    return {projection: files.scale_and_rank(f"{keys[0].path}.0.{names[projection]}")[0] for projection in pairs}


READERS: Mapping[str, Reader] = {"peft": peft, "vllm": vllm, "sglang": sglang}
