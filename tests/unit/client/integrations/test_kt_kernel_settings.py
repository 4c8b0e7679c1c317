"""What each of kt-kernel's keys comes to."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import kt_expert_client as kt
import pytest
from kt_expert_client.integrations.kt_kernel.settings import _KEYS, KtSettings

# kt_kernel/sft/config.py, 0.7.2: the fields of KTConfig.
KT_KERNELS = (
    "kt_backend", "kt_num_threads", "kt_tp_enabled", "kt_threadpool_count", "kt_weight_path",
    "kt_non_expert_weight_path", "kt_expert_weight_format", "kt_weight_lifecycle", "kt_expert_checkpoint_path",
    "kt_num_gpu_experts", "kt_skip_expert_loading", "kt_share_backward_bb", "kt_share_cache_pool",
    "kt_force_fused_expert_lora", "kt_max_cache_depth", "kt_model_max_length", "kt_activation_policy", "kt_lora_rank",
    "kt_lora_alpha", "kt_lora_dropout", "kt_train_mode", "kt_full_weight_grad", "kt_use_lora_experts",
    "kt_lora_expert_num", "kt_lora_expert_intermediate_size", "kt_checkpoint_files", "kt_sharded_metadata",
    "kt_wrap_fn", "kt_wrap_kwargs",
)  # fmt: skip
DEFAULTS = {  # kt-kernel's, with which every configuration of its comes
    "kt_backend": "AMXBF16", "kt_num_threads": 1, "kt_tp_enabled": False, "kt_threadpool_count": 1,
    "kt_expert_weight_format": "bf16",
    "kt_weight_lifecycle": "persistent", "kt_num_gpu_experts": 0, "kt_max_cache_depth": 2, "kt_share_backward_bb": True,
    "kt_share_cache_pool": False, "kt_force_fused_expert_lora": False, "kt_use_lora_experts": False, "kt_lora_dropout": 0.0,
    "kt_train_mode": "lora", "kt_full_weight_grad": False, "kt_skip_expert_loading": True, "kt_weight_path": None,
}  # fmt: skip


def read(keys: Any = None, /, **environment: str) -> KtSettings:
    return KtSettings.read(keys, environment)


def test_all_keys_are_known() -> None:
    assert set(KT_KERNELS) <= set(_KEYS)


def test_kt_kernels_defaults_change_nothing() -> None:
    assert read(DEFAULTS) == KtSettings(kt.RunOptions())
    assert read() == KtSettings(kt.RunOptions())


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"kt_lora_dropout": 0.1}, kt.RunOptions(dropout=0.1)),
        ({"kt_activation_policy": {"cpu": "recompute", "gpu": "retain"}}, kt.RunOptions(tickets="inputs")),
        ({"kt_activation_policy": SimpleNamespace(cpu="retain", gpu="recompute")}, kt.RunOptions(tickets="activations")),
        ({"kt_cpu_activation": "recompute"}, kt.RunOptions(tickets="inputs")),
        ({"kt_use_lora_experts": True}, kt.RunOptions(lora_experts=2, lora_expert_size=1024)),
        (
            {"kt_use_lora_experts": True, "kt_lora_expert_num": 3, "kt_lora_expert_intermediate_size": 64},
            kt.RunOptions(lora_experts=3, lora_expert_size=64),
        ),
        ({"kt_lora_expert_num": 3}, kt.RunOptions()),
    ],
)
def test_keys_become_options(keys: dict[str, Any], expected: kt.RunOptions) -> None:
    assert read(keys).options == expected


def test_the_environment_counts_where_a_key_is_not_given() -> None:
    settings = read(
        {"kt_lora_dropout": 0.2}, ACCELERATE_KT_LORA_DROPOUT="0.1", ACCELERATE_KT_ACTIVATION_POLICY="cpu=recompute,gpu=retain"
    )
    assert settings.options == kt.RunOptions(dropout=0.2, tickets="inputs")
    extra = read(ACCELERATE_KT_USE_LORA_EXPERTS="true", ACCELERATE_KT_LORA_EXPERT_NUM="4", ACCELERATE_KT_TP_ENABLED="false")
    assert extra.options.lora_experts == 4


@dataclass
class _Arguments:
    """As a program has them: other settings beside kt-kernel's."""

    model_name_or_path: str = "model"
    use_kt: bool = True
    kt_lora_dropout: float | None = 0.3
    kt_weight_path: str | None = None


def test_a_programs_arguments_and_plugins_are_read() -> None:
    assert read(_Arguments()).options.dropout == 0.3
    assert read(SimpleNamespace(enabled=True, kt_config={"kt_train_mode": "full"})).train_mode == "full"
    assert read({"kt_config": {"kt_expert_server": "host:1"}}).server == "host:1"


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({"kt_num_threads": 32}, "kt_num_threads=32: the server has the threads.*--threads"),
        ({"kt_threadpool_count": 2}, "the server has the threads"),
        ({"kt_tp_enabled": True}, "the server has the threads"),
        ({"kt_weight_path": "/weights"}, "the server loads the experts"),
        ({"kt_expert_checkpoint_path": "/weights"}, "the server loads the experts"),
        ({"kt_backend": "INT8"}, "the server chooses kernels"),
        ({"kt_expert_weight_format": "rawint4"}, "checkpoint's own encoding"),
        ({"kt_num_gpu_experts": 4}, "all routed experts are on the server"),
        ({"kt_skip_expert_loading": False}, "never loaded here"),
        ({"kt_weight_lifecycle": "ephemeral"}, "keeps its weights"),
        ({"kt_wrap_fn": print}, "in one way only"),
        ({"kt_train_mode": "hybrid"}, "call kt_expert_client.train_in_full"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(keys: dict[str, Any], cause: str) -> None:
    with pytest.raises(kt.UnsupportedModel, match=cause):
        read(keys)


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ({"kt_lora_rnk": 8}, "kt_lora_rnk is no key of kt-kernel's; did you mean kt_lora_rank"),
        ({"kt_train_mode": "some"}, "expected lora, full or hybrid"),
        ({"kt_lora_dropout": "much"}, "expected a number"),
        ({"kt_lora_dropout": 2.0}, r"expected a probability in \[0, 1\)"),
        ({"kt_use_lora_experts": "perhaps"}, "expected true or false"),
        ({"kt_use_lora_experts": True, "kt_lora_expert_num": 0.5}, "expected a whole number"),
        ({"kt_activation_policy": "forget"}, "expected retain or recompute"),
    ],
)
def test_what_makes_no_sense_is_named(keys: dict[str, Any], cause: str) -> None:
    with pytest.raises(kt.InvalidRequest, match=cause):
        read(keys)


def test_an_unknown_variable_is_named() -> None:
    with pytest.raises(kt.InvalidRequest, match="kt_lora_rnk is no key"):
        read(ACCELERATE_KT_LORA_RNK="8")
