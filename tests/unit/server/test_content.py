"""The digest that tells which weights a model has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from kt_expert_server.model.content import _places
from kt_expert_server.model.index import plan_model
from safetensors.torch import save_file
from support.checkpoints import PREFIX, expert_weights, per_expert, write

CONFIG = {"model_type": "qwen3_moe", "hidden_act": "silu"}


def digest(directory: Path) -> str:
    return plan_model(directory).digest


def test_the_same_weights_in_other_files(tmp_path: Path) -> None:
    tensors = per_expert(expert_weights())
    whole = write(tmp_path / "whole", tensors, **CONFIG)
    names = sorted(tensors)
    cut = write(tmp_path / "cut", {}, **CONFIG, torch_dtype="bfloat16")
    (cut / "model.safetensors").unlink()
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name].contiguous() for name in reversed(names) if files[name] == file}, cut / file)
    (cut / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert digest(cut) == digest(whole)


def test_a_line_of_the_config_that_the_experts_do_not_read(tmp_path: Path) -> None:
    tensors = per_expert(expert_weights())
    first = write(tmp_path / "first", tensors, **CONFIG, rope_theta=1e4)
    assert digest(write(tmp_path / "second", tensors, **CONFIG, rope_theta=1e6)) == digest(first)
    assert digest(write(tmp_path / "third", tensors, **CONFIG | {"hidden_act": "gelu_pytorch_tanh"})) != digest(first)


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_one_matrix_of_one_expert_is_another(tmp_path: Path, name: str) -> None:
    weights = expert_weights()
    first = digest(write(tmp_path / "first", per_expert(weights), **CONFIG))
    weights[name][2] += 0.1
    assert digest(write(tmp_path / "second", per_expert(weights), **CONFIG)) != first


def test_experts_in_another_order(tmp_path: Path) -> None:
    weights = expert_weights()
    first = digest(write(tmp_path / "first", per_expert(weights), **CONFIG))
    turned = {name: torch.flip(values, (0,)) for name, values in weights.items()}
    assert digest(write(tmp_path / "second", per_expert(turned), **CONFIG)) != first


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A tensor of all experts, as transformers holds them."""
    gate_up = torch.cat([weights["gate"], weights["up"]], dim=1)
    return {f"{PREFIX}mlp.experts.gate_up_proj": gate_up, f"{PREFIX}mlp.experts.down_proj": weights["down"]}


@pytest.mark.parametrize("expert", range(8))
@pytest.mark.parametrize("name", ["gate", "down"])
def test_one_expert_of_a_tensor_of_all(tmp_path: Path, name: str, expert: int) -> None:
    weights = {"gate": torch.randn(8, 64, 64), "up": torch.randn(8, 64, 64), "down": torch.randn(8, 64, 64)}
    config = {**CONFIG, "hidden_size": 64}
    first = digest(write(tmp_path / "first", fused(weights), **config))
    weights[name][expert] += 0.1
    assert digest(write(tmp_path / "second", fused(weights), **config)) != first


@pytest.mark.parametrize("matrices", [1, 3, 128])
@pytest.mark.parametrize("size", [1, 100, 4096, 10_000, 64 * 1024**2, 64 * 1024**2 - 1, 10**9 + 7])
def test_samples_lie_within_the_tensor(size: int, matrices: int) -> None:
    size *= matrices
    places = list(_places(size, matrices))
    assert all(length > 0 for _, length in places)
    ends = [edge for begin, length in places for edge in (begin, begin + length)]
    assert ends == sorted(ends)
    assert 0 <= ends[0] <= ends[-1] <= size
    assert len(places) == matrices * (1 + size // matrices // (64 * 1024**2))
