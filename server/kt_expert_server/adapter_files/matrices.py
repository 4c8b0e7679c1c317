"""From the tensors of a file to matrices by expert: what all readers do alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kt_expert_server.adapter_files.files import AdapterFiles
from kt_expert_server.adapter_files.keys import PROJECTION_OF, ExpertKey
from kt_expert_server.adapter_files.lora import Array, ExpertMatrices
from kt_expert_server.adapter_files.model import BaseOfAdapter, ExpertSizes
from kt_expert_server.errors import InvalidRequest

_FIRST_UNSWAPPED = (0, 19, 1)  # PEFT before it took the middle of [E, out, in] for the inputs
GATE_UP, DOWN = "gate_up_proj", "down_proj"
Pairs = dict[str, tuple[Array, Array]]  # A and B by projection, or by fused parameter


def fused_pairs(keys: Sequence[ExpertKey], files: AdapterFiles, base: BaseOfAdapter) -> Pairs:
    """Of one layer's fused tensors: A [E, r, in] and B [E, out, r] by parameter, gate_up_proj and down_proj.

    PEFT (tuners/lora/layer.py, ParamWrapper) keeps A as [r * E, in], row e * r + j, and B as [out, r * E], column j * E + e;
    the inner of two wrappers is gate_up's, and one alone is that of its sizes. Raises InvalidRequest for sizes that do not fit.
    """
    sizes = base.layers[keys[0].layer]
    found = {}
    for inner in (True, False):
        sides = {each.side: files.tensors[each.key] for each in keys if each.inner is inner}
        if not sides:
            continue
        if set(sides) != {"A", "B"}:
            raise InvalidRequest(f"{keys[0].path} has LoRA {', '.join(sides)} and not both matrices")
        is_alone = not any(each.inner is not inner for each in keys)
        names = (GATE_UP, DOWN) if is_alone else ((GATE_UP,) if inner else (DOWN,))
        fitting = [(name, pair) for name in names if (pair := _fit(name, sides, sizes, files.version)) is not None]
        if not fitting:
            shapes = {side: values.shape for side, values in sides.items()}
            raise InvalidRequest(f"{keys[0].path} has LoRA of shapes {shapes}, which fit none of {', '.join(names)}")
        found[fitting[0][0]] = fitting[0][1]
    return found


def _fit(name: str, sides: dict[str, Array], sizes: ExpertSizes, version: tuple[int, ...]) -> tuple[Array, Array] | None:
    """A and B by expert where the shapes are those of the parameter; as PEFT has them today, or in each other's place."""
    inputs, outputs = (sizes.hidden, 2 * sizes.intermediate) if name == GATE_UP else (sizes.intermediate, sizes.hidden)
    a, b = sides["A"], sides["B"]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] % sizes.experts:
        return None
    is_today = (a.shape[1], b.shape[0]) == (inputs, outputs)
    is_swapped = (a.shape[1], b.shape[0]) == (outputs, inputs)
    if is_today and is_swapped:
        is_today = not version or version >= _FIRST_UNSWAPPED
    by_expert = a.reshape(sizes.experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, sizes.experts).transpose(2, 0, 1)
    if is_today:
        return by_expert
    return (by_expert[1].transpose(0, 2, 1), by_expert[0].transpose(0, 2, 1)) if is_swapped else None


def split_gate_up(a: Array, b: Array, *, interleaved: bool) -> Pairs:
    """gate and up share A; B's rows are gate's then up's, or take turns."""
    half = b.shape[1] // 2
    gate, up = (b[:, 0::2], b[:, 1::2]) if interleaved else (b[:, :half], b[:, half:])
    return {"gate": (a, gate), "up": (a, up)}


def per_expert_pairs(keys: Sequence[ExpertKey], files: AdapterFiles, experts: int) -> tuple[Pairs, set[str]]:
    """Of one layer's tensors with names per expert: A and B by projection, zero for an expert that is missing, and what is
    missing in words. Ranks of one projection are made equal by zeros."""
    found, missing = {}, set()
    for projection in ("gate", "up", "down"):
        own = [each for each in keys if PROJECTION_OF.get(each.name) == projection]
        tensors = {(each.expert, each.side): files.tensors[each.key] for each in own}
        for expert in range(experts):
            missing |= {f"expert {expert} {projection} {side}" for side in "AB" if (expert, side) not in tensors}
        if not own:
            continue
        rank = max(tensors[key].shape[0 if key[1] == "A" else 1] for key in tensors)
        inputs = next((values.shape[1] for (_, side), values in tensors.items() if side == "A"), 0)
        outputs = next((values.shape[0] for (_, side), values in tensors.items() if side == "B"), 0)
        a, b = np.zeros((experts, rank, inputs), np.float32), np.zeros((experts, outputs, rank), np.float32)
        for (index, side), values in tensors.items():
            if index is None or index >= experts:
                raise InvalidRequest(f"{keys[0].path} has LoRA of expert {index}, the model has {experts} experts")
            target = a[index, : values.shape[0]] if side == "A" else b[index, :, : values.shape[1]]
            if target.shape != values.shape:
                raise InvalidRequest(
                    f"{keys[0].path}.{index} {projection} has {side} of shape {values.shape}, others {target.shape}"
                )
            target[...] = values
        found[projection] = (a, b)
    return found, missing


def with_scale(pairs: Pairs, scales: dict[str, float]) -> dict[str, ExpertMatrices]:
    return {name: ExpertMatrices(a, b, scales[name]) for name, (a, b) in pairs.items()}
