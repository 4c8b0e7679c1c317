"""What a checkpoint's config.json says of its experts, per model family.

Facts are those of transformers' modeling files and of the files its ``save_pretrained`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kt_expert_server.errors import ModelError

FP8_SCALE_SUFFIX = "_scale_inv"  # behind the name of a matrix of fp8 codes
# transformers' names of activations to the engine's.
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
GPT_OSS_ALPHA = 1.702  # GptOssExperts.alpha in transformers
GPT_OSS_LIMIT = 7.0  # GptOssExperts.limit in transformers


@dataclass(frozen=True, slots=True)
class ActivationSpec:
    """kind is `silu` (h = silu(gate) * up) or `gpt_oss` (clamped swiglu with alpha and limit)."""

    kind: str
    alpha: float = 1.0
    limit: float = 0.0


@dataclass(frozen=True, slots=True)
class Naming:
    """How tensors of one layer's experts are called below the layer's prefix.

    Exactly one of `per_expert` (gate, up, down names with {e}) and `fused` (gate_up and down names) is set.
    `transposed`: matrices are [in, out]; `interleaved`: gate and up rows alternate.
    """

    block: str  # between "layers.N." and the tensor's own name
    per_expert: tuple[str, str, str] | None = None
    fused: tuple[str, str] | None = None
    biases: tuple[str, str] | None = None
    transposed: bool = False
    interleaved: bool = False
    scales: tuple[str, str] | None = None  # of fused names that hold mxfp4 blocks


_PROJ = ("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight", "experts.{e}.down_proj.weight")
_W123 = ("experts.{e}.w1.weight", "experts.{e}.w3.weight", "experts.{e}.w2.weight")
_FUSED = ("experts.gate_up_proj", "experts.down_proj")

_MLP = Naming("mlp", per_expert=_PROJ)
_MLP_FUSED = Naming("mlp", fused=_FUSED)
_SPARSE = Naming("block_sparse_moe", per_expert=_W123)
_GPT_OSS = Naming(
    "mlp",
    fused=_FUSED,
    biases=("experts.gate_up_proj_bias", "experts.down_proj_bias"),
    transposed=True,
    interleaved=True,
)
_GPT_OSS_MXFP4 = Naming(
    "mlp",
    fused=("experts.gate_up_proj_blocks", "experts.down_proj_blocks"),
    biases=_GPT_OSS.biases,
    interleaved=True,
    scales=("experts.gate_up_proj_scales", "experts.down_proj_scales"),
)
_GRANITE = Naming("block_sparse_moe", fused=("input_linear.weight", "output_linear.weight"))


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type: the namings its files may use, in order, and the config keys of its sizes."""

    namings: tuple[Naming, ...]
    intermediate_key: str = "moe_intermediate_size"
    top_k_key: str = "num_experts_per_tok"
    activation_key: str = "hidden_act"
    gpt_oss: bool = False


_STANDARD = Family((_MLP, _MLP_FUSED))
_PLAIN = Family((_MLP, _MLP_FUSED), intermediate_key="intermediate_size")
_MIXTRAL = Family(
    (_SPARSE, Naming("mlp", per_expert=_W123), _MLP_FUSED, Naming("block_sparse_moe", fused=_FUSED)),
    intermediate_key="intermediate_size",
)

FAMILIES: Mapping[str, Family] = {
    "deepseek_v2": _STANDARD,
    "deepseek_v3": _STANDARD,
    "dots1": _STANDARD,
    "ernie4_5_moe": Family((_MLP, _MLP_FUSED), top_k_key="moe_k"),
    "glm4_moe": _STANDARD,
    "gpt_oss": Family((_GPT_OSS, _GPT_OSS_MXFP4), intermediate_key="intermediate_size", gpt_oss=True),
    "granitemoe": Family((_GRANITE,), intermediate_key="intermediate_size"),
    "hunyuan_v1_moe": Family((_MLP, _MLP_FUSED), intermediate_key="intermediate_size", top_k_key="moe_topk"),
    "minimax_m2": _MIXTRAL,
    "mixtral": _MIXTRAL,
    "olmoe": _PLAIN,
    "qwen2_moe": _STANDARD,
    "qwen3_moe": _STANDARD,
    "qwen3_next": _STANDARD,
}


def family_of(config: Mapping[str, object]) -> Family:
    """Raises ModelError that names the supported families where this model is none of them."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ModelError(
            f"model_type {model_type!r} is not a supported mixture-of-experts architecture; supported: "
            + ", ".join(sorted(FAMILIES))
        )
    return FAMILIES[model_type]


def top_k_of(config: Mapping[str, object], family: Family, layer: int) -> int:
    """Routes per token of one layer; hunyuan_v1_moe may give a list, one entry per layer."""
    value = config.get(family.top_k_key, config.get("num_experts_per_tok"))
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json gives {family.top_k_key} = {value!r}, expected a positive number")
    return value


def activation_of(config: Mapping[str, object], family: Family) -> ActivationSpec:
    """Raises ModelError for an activation the engine has no kernel for."""
    if family.gpt_oss:
        alpha, limit = config.get("swiglu_alpha", GPT_OSS_ALPHA), config.get("swiglu_limit", GPT_OSS_LIMIT)
        if not isinstance(alpha, (int, float)) or not isinstance(limit, (int, float)) or limit <= 0:
            raise ModelError(f"config.json gives swiglu_alpha = {alpha!r} and swiglu_limit = {limit!r}, expected numbers")
        return ActivationSpec("gpt_oss", float(alpha), float(limit))
    name = config.get(family.activation_key, "silu")
    kind = _ACTIVATIONS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ModelError(f"config.json gives {family.activation_key} = {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return ActivationSpec(kind)


def layer_pattern(naming: Naming) -> re.Pattern[str]:
    """Matches a tensor of one layer's experts: groups prefix, layer, tensor and, where per expert, expert."""
    names = naming.per_expert or (naming.fused or ()) + (naming.biases or ()) + (naming.scales or ())
    coded = f"(?:{re.escape(FP8_SCALE_SUFFIX)})?" if naming.per_expert else ""
    alternatives = "|".join(re.escape(name).replace(re.escape("{e}"), r"(\d+)") for name in names)
    return re.compile(
        rf"^(?P<prefix>(?:[\w.]+\.)?layers\.(?P<layer>\d+)\.{re.escape(naming.block)}\.)(?P<tensor>(?:{alternatives}){coded})$"
    )
