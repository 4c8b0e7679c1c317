"""What happens around a training: aborted passes, scalers, copies, second wraps, new optimizers."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from peft import PeftModel
from support.models import load_stock, random_tokens
from support.server import ServerProcess
from support.training import adapted, history, logits, trainer
from support.waiting import wait_until

pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.*:FutureWarning")


def offload_of(model: torch.nn.Module) -> Any:
    return next(module for module in model.modules() if hasattr(module, "kt_offload")).kt_offload


def backward(model: Any, seed: int) -> None:
    tokens = random_tokens(2, 10, seed=seed)
    model(input_ids=tokens, labels=tokens).loss.backward()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


class Abort(Exception):
    pass


def test_an_aborted_backward_leaves_nothing_in_the_next_window(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = adapted(qwen3_checkpoint, server.address)
    backward(model, 1)
    expected = offload_of(model).run.grad_norm()
    model.zero_grad()

    def abort(*_: Any) -> None:
        raise Abort

    handle = model.get_submodule("base_model.model.model.layers.0.mlp.experts").register_full_backward_hook(abort)
    with pytest.raises(Abort):
        backward(model, 2)
    handle.remove()
    model.zero_grad()
    backward(model, 1)
    assert offload_of(model).run.grad_norm() == expected


def test_the_gradient_scalers_word_reaches_the_server(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    """Fused optimizers are always called; found_inf skips the step, grad_scale is what gradients still carry."""
    results = []
    for scale in (None, 64.0):
        model = adapted(qwen3_checkpoint, server.address)
        optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        tokens = random_tokens(2, 10)
        (model(input_ids=tokens, labels=tokens).loss * (scale or 1.0)).backward()
        run = offload_of(model).run
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert run.steps_taken == 0
        optimizer.found_inf = torch.tensor(0.0)
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale)
        optimizer.step()
        assert run.steps_taken == 1
        results.append(run.get_adapter(parameters=False, moments=True))
    for key, value in results[0].items():
        assert torch.allclose(results[1][key], value, rtol=1e-4, atol=1e-9)


def test_a_step_with_a_closure_is_refused(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = adapted(qwen3_checkpoint, server.address)
    backward(model, 1)
    with pytest.raises(kt.UnsupportedModel, match=r"step\(closure\)"):
        optimizer_of(model).step(lambda: torch.zeros(()))


def test_a_new_optimizer_starts_with_new_moments(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    """Two trainings one after the other, the second with an optimizer of its own, as in process."""
    found = []
    for place, address in (("stock", None), ("remote", server.address)):
        model = adapted(qwen3_checkpoint, address)
        trainer(model, tmp_path / place).train()
        second = trainer(model, tmp_path / place)
        second.train()
        found.append(history(second))
    for (loss, norm, _), (expected_loss, expected_norm, _) in zip(found[1], found[0], strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)


def test_a_loop_may_change_its_optimizer(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    """Between kinds that keep moments and one that keeps none, each new one starting afresh as in process."""
    found = []
    for address in (None, server.address):
        model, losses = adapted(qwen3_checkpoint, address), []
        makes: list[Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = [
            lambda p: torch.optim.AdamW(p, lr=1e-2),
            lambda p: torch.optim.SGD(p, lr=0.5),
            lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
            lambda p: torch.optim.AdamW(p, lr=1e-2),
        ]
        for index, make in enumerate(makes):
            optimizer = make([p for p in model.parameters() if p.requires_grad])
            for step in range(2):
                tokens = random_tokens(2, 10, seed=2 * index + step)
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
        found.append((losses, logits(model, random_tokens(1, 9))))
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-5)
    assert (found[1][1] - found[0][1]).abs().max() < 1e-4


def test_attach_takes_options_until_the_run_is_open(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    options = kt.RunOptions(moments="bf16", tickets="inputs")
    with kt.offload_experts(server.address):
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(qwen3_checkpoint, dtype=torch.float32)
    offload = kt.attach(base, options=options)
    assert offload.options == options
    logits(base, random_tokens(1, 4))
    assert kt.attach(base, server.address, options) is offload
    with pytest.raises(kt.WrongPhase, match=r"run is open with .*bf16.* is asked for"):
        kt.attach(base, options=kt.RunOptions())
    with pytest.raises(kt.InvalidRequest, match="experts are at"):
        kt.attach(base, "127.0.0.1:1")


def test_copies_and_compiled_models_compute_the_same(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = adapted(qwen3_checkpoint, server.address)
    tokens = random_tokens(1, 8)
    expected = logits(model, tokens)
    copied = copy.deepcopy(model.get_base_model())
    assert torch.equal(logits(copied, tokens), expected)
    compiled = torch.compile(model.get_base_model(), backend="aot_eager")
    assert torch.allclose(logits(compiled, tokens), expected, atol=1e-5)
    torch._dynamo.reset()


def test_low_cpu_mem_usage_loads_an_adapter(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    stock = adapted(qwen3_checkpoint, None)
    trainer(stock, tmp_path / "stock").train()
    stock.save_pretrained(tmp_path / "adapter")
    with kt.offload_experts(server.address):
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(qwen3_checkpoint, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=True)
    tokens = random_tokens(2, 8)
    assert (logits(model, tokens) - logits(stock, tokens)).abs().max() < 1e-5


def test_a_model_that_is_gone_gives_its_run_back(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    gc.collect()
    model = adapted(qwen3_checkpoint, server.address)
    backward(model, 1)
    name = offload_of(model).run.name
    del model
    gc.collect()
    with kt.connect(server.address) as client:
        wait_until(lambda: name not in {run.run for run in client.status().runs})


def test_a_failed_load_leaves_the_library_as_it_was(
    server: ServerProcess, qwen3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    def fail(*_: Any, **__: Any) -> None:
        raise Abort

    stock_class = modeling_qwen3_moe.Qwen3MoeExperts
    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen3_moe.Qwen3MoeRMSNorm, "__init__", fail)
        with pytest.raises(Abort), kt.offload_experts(server.address):
            AutoModelForCausalLM.from_pretrained(qwen3_checkpoint)
    assert modeling_qwen3_moe.Qwen3MoeExperts is stock_class
    assert [name for name, _ in load_stock(qwen3_checkpoint).named_parameters() if ".experts." in name]
