"""Every supported family, from its own config: the offloaded model equals the stock one, logits and gradients."""

from __future__ import annotations

from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import CONFIGS, load_stock, random_tokens, save_checkpoint
from support.server import ServerProcess
from support.waiting import wait_until
from transformers import AutoModelForCausalLM, PreTrainedModel

# Both sides hold the same bf16 weights and compute in fp32; only the order of summation differs.
LOGIT_BOUND = 1e-4
GRADIENT_BOUND = 1e-4


def poison_experts(directory: Path) -> None:
    """The trainer's copy of the checkpoint gets NaN for experts: reading one of them would show."""
    tensors = load_file(directory / "model.safetensors")
    for name, value in tensors.items():
        if ".experts." in name or "input_linear" in name or "output_linear" in name:
            value.fill_(float("nan"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def gradients(model: PreTrainedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), found


def freeze_experts(model: PreTrainedModel) -> int:
    """Returns how many numbers that are."""
    experts = [parameter for name, parameter in model.named_parameters() if ".experts." in name]
    for parameter in experts:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in experts)


@pytest.mark.parametrize("family", CONFIGS)
def test_offloaded_equals_stock(family: str, tmp_path: Path) -> None:
    served = save_checkpoint(family, tmp_path / "served")
    local = save_checkpoint(family, tmp_path / "local")
    poison_experts(local)
    stock = load_stock(served)
    tokens = random_tokens(2, 16)
    with ServerProcess(served, tmp_path / "log") as server:
        with kt.offload_experts(server.address):
            remote, info = AutoModelForCausalLM.from_pretrained(local, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        frozen = [freeze_experts(model) for model in (remote, stock)]
        assert frozen[0] == frozen[1] > 0
        expected_logits, expected = gradients(stock, tokens)
        logits, got = gradients(remote, tokens)
        assert (logits - expected_logits).abs().max() <= LOGIT_BOUND * expected_logits.abs().max()
        assert set(got) == set(expected)
        for name, gradient in got.items():
            scale = expected[name].abs().max()
            assert (gradient - expected[name]).abs().max() <= GRADIENT_BOUND * scale + 1e-9, name
        routers = [n for n in got if ".gate." in n or ".router." in n]
        assert any(got[name].abs().max() > 0 for name in routers)
        wait_until(lambda: server.metric("kt_expert_tickets") == 0)


def test_families_are_those_the_server_names() -> None:
    from kt_expert_server.model.architecture import FAMILIES

    assert set(CONFIGS) == set(FAMILIES)
