"""What a trainer may do to expert weights: merge LoRA into them, average, write, save and train them, as in process."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from golden.reference import relative_error
from peft import get_peft_model
from safetensors.torch import load_file
from support.models import random_tokens
from support.server import ServerProcess
from support.training import adapted, lora_config
from torch.optim.swa_utils import AveragedModel

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own
BOUND = 1e-5
ROUNDED = 2e-2  # weights that hold LoRA's sum are rounded to bf16 where the server computes
TOKENS = random_tokens(1, 6)
DOWN = "model.layers.1.mlp.experts.down_proj"


def made(checkpoint: Path, address: str | None) -> Any:
    model = adapted(checkpoint, address)
    randomise(model)
    return model


def randomise(model: Any) -> None:
    """By name: the order of two models may differ."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted((name, each) for name, each in model.named_parameters() if "lora_" in name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=TOKENS).logits
    return values


def merged(model: Any, out: Path) -> torch.Tensor:
    del out
    return logits(model.merge_and_unload())


def merged_with_a_check(model: Any, out: Path) -> torch.Tensor:
    del out
    return logits(model.merge_and_unload(safe_merge=True))


def values_of_merged_weights(model: Any, out: Path) -> torch.Tensor:
    del out
    values: torch.Tensor = dict(model.merge_and_unload().named_parameters())[DOWN].detach().cpu()
    return values


def a_saved_merged_model(model: Any, out: Path) -> torch.Tensor:
    model.merge_and_unload().save_pretrained(out)
    tensors = load_file(out / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def an_adapter_made_again_with_another_rank(model: Any, out: Path) -> torch.Tensor:
    del out
    config = lora_config()
    config.r = 2 * config.r
    again = get_peft_model(model.unload(), config)
    del model
    randomise(again)
    return logits(again)


def an_averaged_model(model: Any, out: Path) -> torch.Tensor:
    del out
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2.0)
    average.update_parameters(model)
    return logits(average)


def data_that_is_set(model: Any, out: Path) -> torch.Tensor:
    del out
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.full(parameter.shape, 0.05)
    return logits(model)


@pytest.mark.parametrize(
    "what",
    [
        merged,
        merged_with_a_check,
        values_of_merged_weights,
        a_saved_merged_model,
        an_adapter_made_again_with_another_rank,
        an_averaged_model,
        data_that_is_set,
    ],
)
def test_as_in_process(
    what: Callable[[Any, Path], torch.Tensor], server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path
) -> None:
    expected = what(made(qwen3_checkpoint, None), tmp_path / "stock")
    got = what(made(qwen3_checkpoint, server.address), tmp_path / "remote")
    torch.testing.assert_close(got, expected, rtol=0.0, atol=BOUND)


def test_merged_weights_are_trained(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    gradients = []
    for address in (None, server.address):
        model = made(qwen3_checkpoint, address).merge_and_unload().requires_grad_(True)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append(dict(model.named_parameters())[DOWN].grad.clone())
    assert relative_error(gradients[1], gradients[0]) < ROUNDED


def test_one_layer_in_full_beside_lora(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    losses = []
    for address in (None, server.address):
        model = adapted(qwen3_checkpoint, address)
        randomise(model)
        if address is None:
            trained = [p for name, p in model.named_parameters() if "layers.2.mlp.experts" in name and "lora_" not in name]
            for parameter in trained:
                parameter.requires_grad_(True)
        else:
            trained = kt.train_in_full(model, [2])
        assert len(trained) == 2
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(5):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)  # the server computes with the bf16 form of what it trains


def test_only_layers_that_there_are_can_be_trained(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = adapted(qwen3_checkpoint, server.address)
    with pytest.raises(kt.InvalidRequest, match=r"layers \[7\] have no experts on a server; those that have: \[0, 1, 2\]"):
        kt.train_in_full(model, [2, 7])


def test_copies_that_are_gone_are_gone_on_the_server_too(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = made(qwen3_checkpoint, server.address)

    def adapters() -> set[str]:
        logits(model)  # what is not used any more goes with the next request
        return {key.adapter for key in model.kt_expert_offload.run.get_adapter()}

    assert adapters() == {"default"}
    for _ in range(3):
        copied = copy.deepcopy(model)
        model.merge_adapter()
        assert len(adapters()) == 3  # it, the copy, and what was merged
        model.unmerge_adapter()
        del copied
        gc.collect()
        assert adapters() == {"default"}
