"""Routing that is recorded and played again: the same experts, the same bits, and a router that goes on learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from ecosystem.case import loss_of, randomise, trainable
from support.models import random_tokens
from support.server import ServerProcess
from support.training import adapted

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own
TOKENS = random_tokens(2, 9)


@pytest.fixture
def model(server: ServerProcess, qwen3_checkpoint: Path) -> Any:
    made = adapted(qwen3_checkpoint, server.address)
    randomise(made)
    return made


def gates(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")]


def disturb(model: Any) -> None:
    """Another router: tokens would take other experts."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for gate in gates(model):
            gate.add_(torch.randn(gate.shape, generator=generator) * 0.5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=TOKENS).logits
    return values


def test_a_replayed_pass_has_the_bits_of_the_recorded_one(model: Any, tmp_path: Path) -> None:
    with kt.record_routing() as routing:
        expected = logits(model)
    assert {layer: [tuple(each.ids.shape) for each in passes] for layer, passes in routing.layers.items()} == {
        layer: [(18, 2)] for layer in range(3)
    }
    disturb(model)
    assert not torch.equal(logits(model), expected)
    routing.save(tmp_path / "routing.safetensors")
    for played in (routing, kt.Routing.load(tmp_path / "routing.safetensors")):
        with kt.replay_routing(played):
            assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_step_on_replayed_routing(model: Any, *, checkpointed: bool) -> None:
    """Losses and gradients are those of the recorded experts; where the router agrees, it learns."""
    with kt.record_routing() as routing:
        expected = loss_of(model)
    expected.backward()
    for gate in gates(model):
        gate.requires_grad_()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = float(torch.linalg.vector_norm(parameter.grad))
    model.zero_grad()
    with kt.replay_routing(routing):
        loss = loss_of(model)
        loss.backward()
    assert torch.equal(loss.detach(), expected.detach())
    for name, norm in found.items():
        assert float(torch.linalg.vector_norm(dict(model.named_parameters())[name].grad)) == pytest.approx(norm, rel=1e-6)
    assert all(gate.grad is not None and bool(gate.grad.any()) for gate in gates(model))


def test_a_rollout_is_trained_on_with_its_experts(model: Any) -> None:
    """Decoded token by token, then one pass over the whole sequence."""
    prompt = random_tokens(1, 5)
    with kt.record_routing() as rollout:
        sequence = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, min_new_tokens=6)
    assert [len(each.ids) for each in rollout.layers[0]] == [5, 1, 1, 1, 1, 1]
    routing = rollout.joined()
    disturb(model)
    with kt.record_routing() as again, kt.replay_routing(routing):
        model(input_ids=sequence[:, :-1], labels=sequence[:, :-1]).loss.backward()
    for layer, passes in routing.layers.items():
        assert torch.equal(again.layers[layer][0].ids, passes[0].ids)
        assert torch.equal(again.layers[layer][0].weights, passes[0].weights)


def test_decode_and_training_have_the_same_bits(server: ServerProcess) -> None:
    """A layer's output for a token does not depend on what it is sent with, nor on whether a backward may come."""
    generator = torch.Generator().manual_seed(3)
    with kt.connect(server.address) as client:
        run = client.open_run()
        hidden = torch.randn(24, 32, generator=generator)
        ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(24)])
        weights = torch.rand(24, 2, generator=generator)
        together = run.submit_forward(0, hidden, ids, weights)
        for token in range(24):
            part = slice(token, token + 1)
            alone = run.submit_forward(0, hidden[part], ids[part], weights[part], save_for_backward=False).result()
            assert torch.equal(alone, together.result()[part])
        run.release(together.ticket)
        run.leave()


def test_what_cannot_be_replayed_is_said(model: Any) -> None:
    with kt.record_routing() as routing:
        logits(model)
    with kt.replay_routing(routing):
        logits(model)
        with pytest.raises(kt.WrongPhase, match="pass 2 of layer 0 is to be replayed, and 1 were recorded"):
            logits(model)
    with (
        kt.replay_routing(routing),
        pytest.raises(kt.InvalidRequest, match=r"recorded with \[T, k\] = \[18, 2\], and has \[20, 2\]"),
    ):
        loss_of(model)
    with kt.replay_routing(routing), pytest.raises(kt.WrongPhase, match="already"), kt.replay_routing(routing):
        pass
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    with pytest.raises(kt.WrongPhase, match="call backward inside replay_routing"), kt.replay_routing(routing):
        model(input_ids=TOKENS)
    assert trainable(model)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(kt.InvalidRequest, match="has a tensor a"):
        kt.Routing.load(tmp_path / "x")
    save_file({"0.1.ids": torch.zeros(1, 1), "0.1.weights": torch.zeros(1, 1)}, tmp_path / "y")
    with pytest.raises(kt.InvalidRequest, match="lacks ids or weights of pass 0 of layer 0"):
        kt.Routing.load(tmp_path / "y")
