"""Stock Trainer and PEFT on an offloaded model: the same run as in process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client.parameters.tensor import RemoteTensor
from peft import PeftModel, get_peft_model
from support.models import load_stock, random_tokens, save_checkpoint
from support.server import ServerProcess
from support.training import adapted, history, logits, lora_config, no_tickets_left, trainer
from transformers import AutoModelForCausalLM

LOSS_BOUND = 1e-5
NORM_BOUND = 1e-4
LOGIT_BOUND = 1e-5

# The names these arguments have in this transformers version are deprecated aliases of new ones; both must work.
# PEFT warns of patterns that match parameters and not modules, though it follows them.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "plain": {},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
}
CONFIGS = {
    "rank and alpha": {"r": 6, "lora_alpha": 3},
    "rslora": {"use_rslora": True},
    "gate and up only": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "down only": {"target_parameters": ["mlp.experts.down_proj"]},
    "per-projection rank": {"rank_pattern": {r".*\.down_proj": 2}, "alpha_pattern": {r".*\.down_proj": 5}},
    "names of separate projections": {
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "target_parameters": None,
    },
    "experts alone": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def assert_same_history(got: list[tuple[float, float, float]], expected: list[tuple[float, float, float]]) -> None:
    assert len(got) == len(expected) > 0
    for (loss, norm, rate), (expected_loss, expected_norm, expected_rate) in zip(got, expected, strict=True):
        assert loss == pytest.approx(expected_loss, abs=LOSS_BOUND)
        assert norm == pytest.approx(expected_norm, rel=NORM_BOUND)
        assert rate == expected_rate


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_the_run_equals_the_one_in_process(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, mode: str) -> None:
    stock = trainer(adapted(qwen3_checkpoint, None), tmp_path / "stock")
    stock.train()
    model = adapted(qwen3_checkpoint, server.address)
    remote = trainer(model, tmp_path / "remote", **CHECKPOINTING[mode])
    with no_tickets_left(server):
        remote.train()
    assert_same_history(history(remote), history(stock))
    tokens = random_tokens(2, 12)
    assert (logits(model, tokens) - logits(stock.model, tokens)).abs().max() < LOGIT_BOUND


@pytest.mark.parametrize("what", CONFIGS)
def test_the_users_lora_config_decides(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, what: str) -> None:
    runs = {}
    for place, address in (("stock", None), ("remote", server.address)):
        runs[place] = trainer(adapted(qwen3_checkpoint, address, lora_config(**CONFIGS[what])), tmp_path / place)
        runs[place].train()
    assert_same_history(history(runs["remote"]), history(runs["stock"]))
    remote, stock = runs["remote"].model, runs["stock"].model
    assert remote.get_nb_trainable_parameters()[0] == stock.get_nb_trainable_parameters()[0]
    remote.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_stock(qwen3_checkpoint), tmp_path / "adapter")
    tokens = random_tokens(2, 12)
    assert (logits(again, tokens) - logits(stock, tokens)).abs().max() < LOGIT_BOUND


def test_an_adapter_travels_both_ways(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    """Trained in process, loaded offloaded, saved offloaded, loaded in process: the same logits everywhere."""
    stock = trainer(adapted(qwen3_checkpoint, None), tmp_path / "stock")
    stock.train()
    stock.model.save_pretrained(tmp_path / "first")
    tokens = random_tokens(2, 12)
    expected = logits(stock.model, tokens)
    with kt.offload_experts(server.address):
        base = AutoModelForCausalLM.from_pretrained(qwen3_checkpoint, dtype=torch.float32)
    remote = PeftModel.from_pretrained(base, tmp_path / "first")
    assert (logits(remote, tokens) - expected).abs().max() < LOGIT_BOUND
    remote.save_pretrained(tmp_path / "second")
    again = PeftModel.from_pretrained(load_stock(qwen3_checkpoint), tmp_path / "second")
    assert (logits(again, tokens) - expected).abs().max() < LOGIT_BOUND
    fresh = adapted(qwen3_checkpoint, server.address)
    assert (logits(fresh, tokens) - expected).abs().max() > 10 * LOGIT_BOUND
    fresh.load_adapter(tmp_path / "second", "default", is_trainable=True)
    assert (logits(fresh, tokens) - expected).abs().max() < LOGIT_BOUND
    first = {path.name: path.stat().st_size for path in (tmp_path / "first").glob("*.safetensors")}
    second = {path.name: path.stat().st_size for path in (tmp_path / "second").glob("*.safetensors")}
    assert first == second
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("first", "second")]
    assert configs[0]["target_parameters"] == configs[1]["target_parameters"]


def test_resume_continues_the_run(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    whole = trainer(adapted(qwen3_checkpoint, server.address), tmp_path / "whole", max_steps=6)
    whole.train()
    half = trainer(
        adapted(qwen3_checkpoint, server.address), tmp_path / "half", max_steps=6, save_strategy="steps", save_steps=3
    )
    half.train()
    checkpoint = tmp_path / "half" / "checkpoint-3"
    assert (checkpoint / "optimizer.pt").is_file()
    resumed = trainer(adapted(qwen3_checkpoint, server.address), tmp_path / "resumed", max_steps=6)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_same_history(history(resumed)[3:], history(whole)[3:])
    tokens = random_tokens(2, 12)
    assert (logits(resumed.model, tokens) - logits(whole.model, tokens)).abs().max() < LOGIT_BOUND


def test_disable_adapter_generate_and_evaluate(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    stock = trainer(adapted(qwen3_checkpoint, None), tmp_path / "stock")
    remote = trainer(adapted(qwen3_checkpoint, server.address), tmp_path / "remote")
    for made in (stock, remote):
        made.train()
    tokens = random_tokens(1, 8)
    with no_tickets_left(server):
        with stock.model.disable_adapter(), remote.model.disable_adapter():
            base, remote_base = logits(stock.model, tokens), logits(remote.model, tokens)
        assert (remote_base - base).abs().max() < LOGIT_BOUND
        assert (logits(remote.model, tokens) - base).abs().max() > 10 * LOGIT_BOUND
        generated = [m.model.generate(input_ids=tokens, max_new_tokens=8, do_sample=False) for m in (remote, stock)]
        assert torch.equal(*generated)
        losses = [m.evaluate(eval_dataset=m.train_dataset[:8])["eval_loss"] for m in (remote, stock)]
    assert losses[0] == pytest.approx(losses[1], abs=LOSS_BOUND)


def test_dropout_is_the_same_under_checkpointing(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpointing runs a forward twice with torch's generator wound back: the experts drop the same values twice."""
    histories, outputs = {}, {}
    for name, dropout in (("none", "0"), *((name, "0.3") for name in CHECKPOINTING)):
        monkeypatch.setenv("KT_EXPERT_DROPOUT", dropout)
        model = adapted(qwen3_checkpoint, server.address)
        with no_tickets_left(server):
            made = trainer(model, tmp_path / name, **CHECKPOINTING.get(name, {}))
            made.train()
        histories[name] = [loss for loss, _, _ in history(made)]
        outputs[name] = logits(model, random_tokens(1, 9))
        assert torch.equal(outputs[name], logits(model, random_tokens(1, 9)))  # off in evaluation
    assert histories["plain"] != pytest.approx(histories["none"], abs=1e-4)
    for name in CHECKPOINTING:
        assert histories[name] == pytest.approx(histories["plain"], abs=LOSS_BOUND)
        assert (outputs[name] - outputs["plain"]).abs().max() < LOGIT_BOUND


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.05),
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.5),
    ],
    ids=["AdamW", "Adam with L2", "SGD with momentum", "SGD"],
)
def test_a_loop_of_ones_own(server: ServerProcess, qwen3_checkpoint: Path, make: Any) -> None:
    """attach() on a model that holds its experts; clipping, both kinds of zero_grad, accumulation, no Trainer."""
    results = []
    for address in (None, server.address):
        torch.manual_seed(1)
        base = load_stock(qwen3_checkpoint)
        if address is not None:
            kt.attach(base, address)
            experts = [parameter for name, parameter in base.named_parameters() if ".experts." in name]
            assert experts
            assert all(isinstance(parameter, RemoteTensor) for parameter in experts)
        model = get_peft_model(base, lora_config())
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        norms = []
        for step in range(6):
            for micro in range(2):
                tokens = random_tokens(2, 10, seed=10 * step + micro)
                (model(input_ids=tokens, labels=tokens).loss / 2).backward()
            parameters = [p for p in model.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 0.05)))
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
        results.append((norms, logits(model, random_tokens(1, 9))))
    assert results[1][0] == pytest.approx(results[0][0], rel=NORM_BOUND)
    assert (results[1][1] - results[0][1]).abs().max() < 2 * LOGIT_BOUND


def test_what_cannot_work_says_so(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    model = adapted(qwen3_checkpoint, server.address)
    lora = next(p for name, p in model.named_parameters() if ".experts." in name and "lora_A" in name)
    tokens = random_tokens(1, 6)
    model(input_ids=tokens, labels=tokens).loss.backward()
    with pytest.raises(kt.UnsupportedModel, match=r"optimizer is torch\.optim\.rmsprop\.RMSprop"):
        torch.optim.RMSprop([lora], lr=0.1).step()
    with pytest.raises(kt.InvalidRequest, match="KT_EXPERT_SERVER"):
        kt.attach(load_stock(qwen3_checkpoint))
    other = save_checkpoint("mixtral", tmp_path / "other")
    with pytest.raises(kt.WrongPhase, match=r"this model is a mixtral, the server at .* has loaded a qwen3_moe"):
        adapted(other, server.address)


def test_merged_lora_is_computed_with_and_taken_out_again(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model, tokens = adapted(qwen3_checkpoint, server.address), random_tokens(1, 6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.full(parameter.shape, 0.05))
        expected = model(input_ids=tokens).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_bf16_trainers_send_bf16(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    tokens = random_tokens(2, 12)
    with kt.offload_experts(server.address):
        remote = AutoModelForCausalLM.from_pretrained(qwen3_checkpoint, dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(qwen3_checkpoint, dtype=torch.bfloat16, experts_implementation="eager")
    reference = load_stock(qwen3_checkpoint)
    models = [get_peft_model(model, lora_config()) for model in (remote, stock, reference)]
    losses = []
    for model in models:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
    offload = next(module for module in remote.modules() if hasattr(module, "kt_offload")).kt_offload
    assert offload.wire_dtype == "bf16"
    # No further from the fp32 truth than bf16 in process is, give or take one rounding of the loss.
    assert abs(losses[0] - losses[2]) <= abs(losses[1] - losses[2]) + 2**-8 * losses[2]
