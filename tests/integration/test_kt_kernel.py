"""Code that was written for kt-kernel, on a server: one layer's wrapper beside the same computed by torch, and whole models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client.integrations.experts import RemoteExperts
from kt_expert_client.integrations.kt_kernel import (
    KTMoEWrapper,
    build_kt_device_map,
    load_kt_model,
    save_fused_expert_lora,
    wrap_moe_layers,
    wrap_moe_layers_with_kt_wrapper,
)
from kt_expert_server.cli.tool import main
from peft import PeftModel
from support.models import load_stock, random_tokens
from support.server import ServerProcess
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
LAYER, TOKENS, RANK, ALPHA = 1, 11, 4, 8.0
NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


class _Torch:
    """The layer in process."""

    def __init__(self, model: Any, lora: dict[str, torch.Tensor]) -> None:
        experts = model.model.layers[LAYER].mlp.experts
        self.gate_up, self.down = experts.gate_up_proj.detach(), experts.down_proj.detach()
        self.lora = lora

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        deltas = {
            name: (ALPHA / RANK) * self.lora[f"{name}_lora_b"] @ self.lora[f"{name}_lora_a"] if self.lora else 0.0
            for name in ("gate", "up", "down")
        }
        gate, up = self.gate_up.chunk(2, dim=1)
        gate, up, down = gate + deltas["gate"], up + deltas["up"], self.down + deltas["down"]
        rows = []
        for token in range(x.shape[0]):
            routes = [
                weight * (down[expert] @ (nn.functional.silu(gate[expert] @ x[token]) * (up[expert] @ x[token])))
                for expert, weight in zip(ids[token].tolist(), weights[token], strict=True)
                if 0 <= expert < len(gate)
            ]
            rows.append(torch.stack(routes).sum(dim=0) if routes else torch.zeros_like(x[token]))
        return torch.stack(rows)


@pytest.fixture
def client(server: ServerProcess) -> Iterator[kt.Client]:
    with kt.connect(server.address) as connected:
        yield connected


@pytest.fixture
def run(client: kt.Client) -> kt.Run:
    return client.open_run(wire_dtype="fp32")


def make_lora(spec: Any, *, as_parameters: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    made: dict[str, torch.Tensor] = {}
    for name in NAMES:
        inputs, outputs = spec.hidden_size, spec.intermediate_size
        if name.startswith("down"):
            inputs, outputs = outputs, inputs
        shape = (spec.num_experts, RANK, inputs) if name.endswith("a") else (spec.num_experts, outputs, RANK)
        values = torch.randn(shape, generator=generator) * 0.1
        made[name] = nn.Parameter(values) if as_parameters else values
    return made


def batch(spec: Any, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, spec.hidden_size, generator=generator)
    ids = torch.stack([torch.randperm(spec.num_experts, generator=generator)[: spec.top_k] for _ in range(TOKENS)])
    return x, ids, torch.rand(TOKENS, spec.top_k, generator=generator)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected.detach(), atol=2e-6 * max(1.0, float(expected.abs().max())), rtol=0)


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_an_optimizers_loop_is_that_of_torch(
    client: kt.Client, run: kt.Run, qwen3_checkpoint: Path, *, is_asynchronous: bool
) -> None:
    """Three steps of two micro-batches, scaled as kt-kernel's ranks scale: outputs, all gradients and values."""
    spec = client.layers[LAYER]
    ours, theirs = (make_lora(spec, as_parameters=True) for _ in range(2))
    gradients = [torch.zeros_like(ours[name]) for name in NAMES]
    wrapper = KTMoEWrapper(run, spec, lora_rank=RANK, lora_alpha=ALPHA)
    wrapper.load_weights(torch.arange(spec.num_experts))
    wrapper.init_lora_weights(*(ours[name] for name in NAMES), *gradients)
    reference = _Torch(load_stock(qwen3_checkpoint), theirs)
    optimizers = [torch.optim.AdamW(lora.values(), lr=1e-2) for lora in (ours, theirs)]
    for step in range(3):
        for micro in range(2):
            x, ids, weights = batch(spec, seed=10 * step + micro)
            x.requires_grad_(True)
            weights.requires_grad_(True)
            expected = reference(x, ids, weights)
            grad_output = torch.randn(expected.shape, generator=torch.Generator().manual_seed(step))
            grads = torch.autograd.grad(expected, [x, weights, *theirs.values()], grad_output)
            for name, gradient in zip(theirs, grads[2:], strict=True):
                theirs[name].grad = gradient / 2 if micro == 0 else theirs[name].grad + gradient / 2
            if is_asynchronous:
                wrapper.submit_forward(x, ids, weights)
                output = wrapper.sync_forward()
                wrapper.submit_backward_repack()
                wrapper.submit_backward_async(grad_output, optimizer_grad_scale=0.5)
                wrapper.wait_backward_repack()
                got = wrapper.sync_backward()
            else:
                output = wrapper.forward(x, ids, weights)
                got = wrapper.backward(grad_output, optimizer_grad_scale=0.5)
            close(output, expected)
            close(got[0], grads[0])
            close(got[1], grads[1])
        for name, gradient in zip(NAMES, gradients, strict=True):
            assert ours[name].grad is gradient
            close(gradient, theirs[name].grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        wrapper.update_lora_weights()
    for name in NAMES:
        torch.testing.assert_close(ours[name], theirs[name], atol=2e-5, rtol=0)


def test_without_lora_and_with_experts_that_are_not_there(client: kt.Client, run: kt.Run, qwen3_checkpoint: Path) -> None:
    spec = client.layers[LAYER]
    x, ids, weights = batch(spec)
    ids[0], ids[1, 0] = -1, spec.num_experts
    wrapper = KTMoEWrapper(run, spec)
    output = wrapper.forward(x.bfloat16(), ids, weights, save_for_backward=False)
    assert output.dtype == torch.bfloat16
    assert not output[0].any()
    reference = _Torch(load_stock(qwen3_checkpoint), {})(x.bfloat16().float(), ids, weights)
    torch.testing.assert_close(output.float(), reference, atol=1e-2, rtol=1e-2)


def test_gradients_of_plain_tensors_are_the_last_backwards(client: kt.Client, run: kt.Run) -> None:
    spec = client.layers[LAYER]
    lora = make_lora(spec, as_parameters=False)
    gradients = [torch.zeros_like(lora[name]) for name in NAMES]
    wrapper = KTMoEWrapper(run, spec, lora_rank=RANK, lora_alpha=ALPHA)
    wrapper.init_lora_weights(*lora.values(), *gradients)
    x, ids, weights = batch(spec)
    wrapper.forward(x, ids, weights)
    wrapper.backward(torch.ones_like(x))
    first = [gradient.clone() for gradient in gradients]
    assert all(gradient.any() for gradient in first)
    wrapper.forward(x, ids, weights)
    wrapper.backward(torch.ones_like(x))
    for before, after in zip(first, gradients, strict=True):
        close(after, before)


def test_the_newest_forward_takes_the_place_of_one_that_nobody_went_back_through(client: kt.Client, run: kt.Run) -> None:
    spec = client.layers[LAYER]
    (x, *routes), (other, *_) = batch(spec, 1), batch(spec, 2)
    alone = KTMoEWrapper(run, spec)
    alone.forward(other, *routes)
    expected = alone.backward(torch.ones_like(x))[0]
    for depth in (1, 2):
        wrapper = KTMoEWrapper(run, spec, max_cache_depth=depth)
        wrapper.forward(x, *routes)
        wrapper.forward(other, *routes)
        close(wrapper.backward(torch.ones_like(x))[0], expected)
        if depth == 1:
            with pytest.raises(kt.WrongPhase, match="no forward is saved"):
                wrapper.backward(torch.ones_like(x))
        else:
            assert not torch.allclose(wrapper.backward(torch.ones_like(x))[0], expected)


def test_what_is_wrong_is_said(client: kt.Client, run: kt.Run) -> None:
    spec = client.layers[LAYER]
    x, ids, weights = batch(spec)
    wrapper = KTMoEWrapper(run, spec, lora_rank=RANK)
    with pytest.raises(kt.WrongPhase, match="no forward is pending"):
        wrapper.sync_forward()
    with pytest.raises(kt.WrongPhase, match="no backward is pending"):
        wrapper.sync_backward()
    with pytest.raises(kt.WrongPhase, match="call init_lora_weights first"):
        wrapper.update_lora_weights()
    with pytest.raises(kt.UnsupportedModel, match="other numbers than the checkpoint"):
        wrapper.load_weights(torch.arange(spec.num_experts).flip(0))
    with pytest.raises(kt.UnsupportedModel, match=r"submit_forward_inference has no meaning .*save_for_backward=False"):
        wrapper.submit_forward_inference()
    with pytest.raises(AttributeError, match="has no frobnicate"):
        wrapper.frobnicate()
    lora = list(make_lora(spec, as_parameters=True).values())
    with pytest.raises(kt.InvalidRequest, match=r"gate_lora_a is \(8, 32, 4\).*, expected \(8, 4, 32\)"):
        wrapper.init_lora_weights(*reversed(lora), *lora)
    wrapper.submit_forward(x, ids, weights)
    with pytest.raises(kt.WrongPhase, match="call sync_forward first"):
        wrapper.submit_forward(x, ids, weights)
    wrapper.sync_forward()
    with pytest.raises(kt.InvalidRequest, match="expected a positive number"):
        wrapper.backward(torch.ones_like(x), optimizer_grad_scale=0.0)
    with pytest.raises(kt.InvalidRequest, match="grad_output has shape"):
        wrapper.backward(torch.ones(3))
    assert wrapper.backward(torch.ones_like(x))[0].shape == x.shape


def test_what_was_trained_is_saved_and_exported(client: kt.Client, run: kt.Run, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    """With gate's and up's own A: to names per expert, from which stock PEFT computes what the server does."""
    wrappers = []
    for layer in sorted(client.layers):
        wrapper = KTMoEWrapper(run, client.layers[layer], lora_rank=RANK, lora_alpha=ALPHA)
        with pytest.raises(kt.InvalidRequest, match="expected each layer once, with LoRA"):
            save_fused_expert_lora([wrapper], tmp_path / "kt")
        lora = make_lora(client.layers[layer], as_parameters=False)
        wrapper.init_lora_weights(*lora.values(), *(torch.zeros_like(each) for each in lora.values()))
        wrappers.append(wrapper)
    save_fused_expert_lora(wrappers, tmp_path / "kt")
    for action in ("export-adapter", "import-adapter"):
        assert main(["checkpoint", action, str(tmp_path / "kt"), str(tmp_path / action), "--model", str(qwen3_checkpoint)]) == 0
        stock = PeftModel.from_pretrained(load_stock(qwen3_checkpoint), tmp_path / action)
        x, ids, weights = batch(client.layers[LAYER])
        experts = stock.base_model.model.model.layers[LAYER].mlp.experts
        with torch.no_grad():
            close(wrappers[LAYER].forward(x, ids, weights, save_for_backward=False), experts(x, ids, weights))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model.eval()(input_ids=random_tokens(2, 9)).logits.cpu()
    return values


def test_a_model_is_loaded_as_kt_kernel_loads_it(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(qwen3_checkpoint)
    plugin = SimpleNamespace(
        kt_config={"kt_expert_server": server.address, "kt_use_lora_experts": True, "kt_lora_expert_intermediate_size": 8}
    )
    model = load_kt_model(config, kt_plugin=plugin, model_name_or_path=str(qwen3_checkpoint), torch_dtype=torch.float32)
    torch.testing.assert_close(_logits(model), _logits(load_stock(qwen3_checkpoint)), atol=1e-5, rtol=0)
    assert len(model.model.layers[0].mlp.lora_experts._modules) == 2


def test_full_training_is_asked_for_as_in_a_programs_arguments(
    server: ServerProcess, qwen3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_EXPERT_SERVER", server.address)
    arguments = SimpleNamespace(model_name_or_path=str(qwen3_checkpoint), use_kt=True, revision=None)
    model = load_kt_model(AutoConfig.from_pretrained(qwen3_checkpoint), arguments, SimpleNamespace(finetuning_type="full"))
    assert next(model.parameters()).dtype == torch.bfloat16
    offload: Any = model.kt_expert_offload
    assert "weights" in {key.adapter for key in offload.run.get_adapter()}


def test_a_loaded_models_layers_are_wrapped(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = load_stock(qwen3_checkpoint)
    expected = _logits(model)
    wrapped = wrap_moe_layers_with_kt_wrapper(model, {"kt_expert_server": server.address})
    assert [type(each).__mro__[1] for each in wrapped] == [RemoteExperts] * model.config.num_hidden_layers
    torch.testing.assert_close(_logits(model), expected, atol=1e-5, rtol=0)
    assert wrap_moe_layers is wrap_moe_layers_with_kt_wrapper


def test_a_server_has_to_be_named(qwen3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KT_EXPERT_SERVER", raising=False)
    with pytest.raises(kt.InvalidRequest, match="give the key kt_expert_server"):
        load_kt_model(AutoConfig.from_pretrained(qwen3_checkpoint), kt_plugin={}, model_name_or_path=str(qwen3_checkpoint))


def test_the_device_map_covers_the_model(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(qwen3_checkpoint)
    found = build_kt_device_map(config, {"kt_expert_server": server.address}, device="cpu")
    assert set(found) == {
        "model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", *(f"model.layers.{layer}" for layer in range(3))
    }  # fmt: skip
    with kt.offload_experts(server.address):
        model = AutoModelForCausalLM.from_pretrained(qwen3_checkpoint, dtype=torch.float32, device_map=found)
    torch.testing.assert_close(_logits(model), _logits(load_stock(qwen3_checkpoint)), atol=1e-5, rtol=0)
