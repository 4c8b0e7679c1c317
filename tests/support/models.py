"""Tiny random models of every supported family, built from their own configs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    HunYuanMoEV1Config,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

VOCABULARY = 128
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
}
_MOE = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
_ROUTED = {**_MOE, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
_MLA = {
    **_BASE,
    **_ROUTED,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_PLAIN = {**_BASE, "intermediate_size": 24, "num_experts_per_tok": 2}

CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2_moe": Qwen2MoeConfig(**_BASE, **_MOE, num_experts=8, shared_expert_intermediate_size=40),
    "qwen3_moe": Qwen3MoeConfig(**_BASE, **_MOE, num_experts=8, head_dim=8, norm_topk_prob=True),
    "qwen3_next": Qwen3NextConfig(
        **_BASE,
        **_MOE,
        num_experts=8,
        shared_expert_intermediate_size=40,
        head_dim=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
    ),
    "mixtral": MixtralConfig(**_PLAIN, num_local_experts=8),
    "deepseek_v2": DeepseekV2Config(**_MLA, topk_method="group_limited_greedy"),
    "deepseek_v3": DeepseekV3Config(**_MLA),
    "gpt_oss": GptOssConfig(
        **_PLAIN,
        num_local_experts=8,
        head_dim=8,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "glm4_moe": Glm4MoeConfig(**_BASE, **_ROUTED, head_dim=8),
    "olmoe": OlmoeConfig(**_PLAIN, num_experts=8),
    "minimax_m2": MiniMaxM2Config(**_PLAIN, num_local_experts=8, head_dim=8),
    "ernie4_5_moe": Ernie4_5_MoeConfig(
        **_BASE, intermediate_size=48, moe_intermediate_size=24, moe_num_experts=8, moe_k=2, moe_num_shared_experts=1
    ),
    "granitemoe": GraniteMoeConfig(**_PLAIN, num_local_experts=8),
    "dots1": Dots1Config(**_BASE, **_ROUTED, n_group=2, topk_group=1),
    "hunyuan_v1_moe": HunYuanMoEV1Config(**_BASE, intermediate_size=24, num_experts=8, moe_topk=[2] * 3, head_dim=8),
}


def build(name: str, *, seed: int = 0, std: float = 0.15) -> PreTrainedModel:
    """A random model whose weights are bf16 numbers, so that fp32 trainers and the server hold the same ones."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn_like(parameter) * std if parameter.dim() > 1 else parameter
            parameter.copy_(values.to(torch.bfloat16).float())
    return model


def save_checkpoint(name: str, directory: Path, *, seed: int = 0) -> Path:
    """Writes the model as users' checkpoints are: bf16 safetensors by save_pretrained."""
    build(name, seed=seed).to(torch.bfloat16).save_pretrained(directory)
    return directory


def load_stock(directory: Path) -> PreTrainedModel:
    """The in-process model in fp32, its experts computed by transformers' own eager loop."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")


def random_tokens(batch: int, length: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
