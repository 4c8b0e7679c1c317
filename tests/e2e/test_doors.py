"""What a trainer may do to parameters, adapters and optimizers beside training them: the same as in process."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from ecosystem.case import lora_of, randomise
from ecosystem.case import loss_of as loss
from kt_expert_client.parameters.matrix import matrix_of
from kt_expert_client.parameters.tensor import RemoteTensor
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support.models import random_tokens
from support.server import ServerProcess
from support.training import adapted, logits

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own
LOGIT_BOUND = 1e-5  # of the largest; Adam divides by the size of small gradients, and so makes much of their rounding
LOSS_BOUND = 2e-6
Pair = tuple[PeftModel, PeftModel]  # in process, and with experts on the server


@pytest.fixture
def pair(server: ServerProcess, qwen3_checkpoint: Path) -> Pair:
    models = adapted(qwen3_checkpoint, None), adapted(qwen3_checkpoint, server.address)
    for model in models:
        randomise(model, 3, scale=0.2)
    return models


def train(
    model: Any, optimizer: torch.optim.Optimizer, steps: int = 3, change: Callable[[Any], object] = lambda _: None
) -> list[float]:
    losses = []
    for step in range(steps):
        value = loss(model, step)
        value.backward()
        change(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


def same(pair: Any, *, bound: float = LOGIT_BOUND) -> None:
    tokens = random_tokens(2, 9)
    ours, theirs = (logits(model, tokens) for model in reversed(pair))
    assert (ours - theirs).abs().max() <= bound * max(1.0, float(theirs.abs().max()))


def both(
    pair: Pair, optimizer: Callable[[Any], torch.optim.Optimizer], *, bound: float = LOGIT_BOUND, **kwargs: Any
) -> None:  # fmt: skip
    losses = [train(model, optimizer(model), **kwargs) for model in pair]
    assert losses[1] == pytest.approx(losses[0], abs=LOSS_BOUND)
    same(pair, bound=bound)


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def test_gradients_have_stocks_values(pair: Pair) -> None:
    for model in pair:
        loss(model, 1).backward()
        loss(model, 2).backward()
    for (name, expected), (_, got) in zip(lora_of(pair[0]).items(), lora_of(pair[1]).items(), strict=True):
        assert torch.allclose(got.grad.detach().cpu(), expected.grad, rtol=1e-4, atol=2e-6), name
        assert bool(torch.isfinite(got.grad).all())


def test_saved_and_loaded_as_a_second_adapter(pair: Pair, tmp_path: Path) -> None:
    for name, model in zip(("stock", "remote"), pair, strict=True):
        model.save_pretrained(tmp_path / name)
    stock, remote = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "remote"))
    assert stock.keys() == remote.keys()
    assert all(torch.equal(remote[key], value) for key, value in stock.items())
    for model in pair:
        randomise(model, 9, scale=0.2)
        model.load_adapter(tmp_path / "stock", "reference")
        model.set_adapter("reference")
    same(pair)
    for model in pair:
        model.set_adapter("default")
    same(pair)


def test_state_dicts_go_both_ways(pair: Pair, tmp_path: Path) -> None:
    stock, remote = (get_peft_model_state_dict(model) for model in pair)
    assert stock.keys() == remote.keys()
    save_file({key: value.contiguous() for key, value in remote.items()}, tmp_path / "one.safetensors")
    assert all(torch.equal(value, stock[key]) for key, value in load_file(tmp_path / "one.safetensors").items())
    buffer = io.BytesIO()
    torch.save({key: value for key, value in pair[1].state_dict().items() if "lora_" in key}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    assert all(torch.equal(value, pair[0].state_dict()[key]) for key, value in saved.items())
    for model in pair:
        randomise(model, 8, scale=0.2)
    set_peft_model_state_dict(pair[1], stock)
    set_peft_model_state_dict(pair[0], stock)
    same(pair)
    pair[1].load_state_dict({key: value * 2 for key, value in saved.items()}, strict=False)
    pair[0].load_state_dict({key: value * 2 for key, value in saved.items()}, strict=False)
    same(pair)


def test_an_optimizers_state_goes_both_ways(pair: Pair) -> None:
    optimizers = [adamw(model) for model in pair]
    for model, optimizer in zip(pair, optimizers, strict=True):
        train(model, optimizer, 2)
    crossed = [copy.deepcopy(optimizer.state_dict()) for optimizer in reversed(optimizers)]
    for model, state in zip(pair, crossed, strict=True):
        fresh = adamw(model)
        fresh.load_state_dict(state)
        train(model, fresh, 3)
    same(pair)


def test_a_deep_copy_is_independent(pair: Pair) -> None:
    copies = tuple(copy.deepcopy(model) for model in pair)
    both(pair, adamw)
    same(copies)
    both(copies, adamw)  # type: ignore[arg-type]
    same(pair)


def test_moves_and_casts_leave_parameters_where_they_are(pair: Pair) -> None:
    remote = pair[1]
    remote.to("cpu")
    remote.to(torch.float64).to(torch.float32)
    assert all(isinstance(p, RemoteTensor) for name, p in remote.named_parameters() if ".experts." in name)
    pair[0].to(torch.float64).to(torch.float32)
    own = sum(p.nbytes for name, p in pair[0].named_parameters() if ".experts." not in name)
    assert remote.get_memory_footprint(return_buffers=False) == own  # of this machine
    both(pair, adamw, change=lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05))


def test_copies_in_another_dtype_are_copies(pair: Pair) -> None:
    """What a snapshot or an average in fp32 of a bf16 model is made of, or one on another device."""
    kept = []
    for model in pair:
        optimizer = adamw(model)
        train(model, optimizer, 2)
        lora = sorted(lora_of(model).items())
        parameters = [parameter for _, parameter in lora]
        snapshot = [p.detach().double() for p in parameters]
        of_snapshot = [each.float() for each in snapshot]
        average = [p.to(torch.float64) for p in parameters]
        transposed = [p.detach().t().double() for p in parameters]
        moments = [optimizer.state[p]["exp_avg"].double() for p in parameters]
        with torch.no_grad():
            average[0].zero_()  # before the parameters change, and below after
        before = [p.detach().clone() for p in parameters]
        train(model, optimizer, 2)
        with torch.no_grad():
            for shadow, parameter in zip(average, parameters, strict=True):
                shadow.lerp_(parameter.double(), 0.25)
        assert all(torch.equal(copy.float().cpu(), p) for copy, p in zip(snapshot, before, strict=True))
        assert all(torch.equal(copy.cpu(), p) for copy, p in zip(of_snapshot, before, strict=True))
        assert all(torch.equal(copy.t().float().cpu(), p) for copy, p in zip(transposed, before, strict=True))
        assert all(not torch.equal(p.detach().cpu(), old) for p, old in zip(parameters, before, strict=True))
        kept.append(torch.cat([each.detach().flatten() for copies in (average, moments) for each in copies]))
    torch.testing.assert_close(kept[1], kept[0], rtol=0, atol=1e-5)
    same(pair)


def test_a_cast_in_a_parameters_own_place_is_the_parameter(pair: Pair) -> None:
    """As PEFT casts adapters, and accelerate moves parameters."""
    remote = pair[1]
    for model in pair:
        for name in list(lora_of(model)):
            owner = model.get_submodule(name.rsplit(".", 1)[0])
            owner.weight = torch.nn.Parameter(owner.weight.data.to(torch.float64))
            owner._parameters["weight"] = torch.nn.Parameter(owner.weight.data.to(torch.float32))
    both(pair, adamw)
    assert all(matrix_of(parameter) for name, parameter in lora_of(remote).items() if ".experts." in name)


def test_an_optimizer_of_copies_steps_them(pair: Pair) -> None:
    """Weights in a wider dtype beside the model's, by hand."""
    for model in pair:
        parameters = [parameter for _, parameter in sorted(lora_of(model).items())]
        masters = [torch.nn.Parameter(parameter.detach().double()) for parameter in parameters]
        optimizer = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
        for step in range(3):
            loss(model, step).backward()
            for master, parameter in zip(masters, parameters, strict=True):
                master.grad, parameter.grad = parameter.grad.double(), None
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(masters, parameters, strict=True):
                    parameter.copy_(master)
    same(pair)


def test_moments_may_come_from_copies(pair: Pair) -> None:
    for model in pair:
        optimizer = adamw(model)
        train(model, optimizer, 2)
        saved = optimizer.state_dict()
        saved["state"] = {
            key: {slot: value.double().float() for slot, value in state.items()} for key, state in saved["state"].items()
        }
        train(model, optimizer, 2)
        optimizer.load_state_dict(saved)
        train(model, optimizer, 1)
    same(pair)


def test_copies_of_copies_and_of_parts(pair: Pair) -> None:
    found = []
    for model in pair:
        parameter = sorted(lora_of(model).items())[0][1].detach()
        copied = parameter.double()
        turned = copied.t().float()
        copied.zero_()
        narrowed = parameter.bfloat16().float()
        part = parameter[2:5].double().float().t()
        wide = parameter.unsqueeze(0).expand(2, -1, -1).double().transpose(1, 2)
        whole = parameter.to(torch.int32).float()
        flat = parameter.t().to(torch.float64, memory_format=torch.contiguous_format).view(-1)
        assert parameter[2:5].double().storage_offset() == 0
        found.append([each.clone().cpu() for each in (copied, turned, narrowed, part, wide, whole, flat)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_lora_is_merged_into_a_copy_alone(pair: Pair) -> None:
    found = []
    for model in pair:
        wrapper = model.base_model.model.model.layers[1].mlp.experts
        weight = getattr(wrapper.get_base_layer(), wrapper.parameter_name)
        copied = weight.detach().double()
        copied.add_(wrapper.get_delta_weight("default").detach())
        found.append((copied.clone().cpu(), weight.detach().clone().cpu()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_weights_that_are_written_leave_copies_as_they_are(pair: Pair) -> None:
    for model in pair:
        weights = model.base_model.model.model.layers[0].mlp.experts.get_base_layer().down_proj
        before, copied = weights.detach().clone(), weights.detach().double()
        with torch.no_grad():
            weights.mul_(0.5)
        assert torch.equal(copied.float().cpu(), before)
        assert torch.equal(weights.detach().cpu(), before * 0.5)


def test_arithmetic_on_parameters(pair: Pair) -> None:
    """Anything torch can do to a parameter, read and written back where nothing better is known."""
    for model in pair:
        with torch.no_grad():
            for parameter in lora_of(model).values():
                parameter.mul_(0.5).add_(0.01)
                parameter[0].zero_()
                parameter.data.clamp_(-0.3, 0.3)
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
    norms = [sum(float((p.detach() ** 2).sum() + p.detach().abs().max()) for p in lora_of(model).values()) for model in pair]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    same(pair)


def test_moments_that_another_optimizer_replaced_are_not_taken_for_ones_own(pair: Pair) -> None:
    remote = pair[1]
    first, second = adamw(remote), adamw(remote)
    train(remote, first, 1)
    saved = copy.deepcopy(first.state_dict())
    train(remote, second, 1)
    loss(remote).backward()
    with pytest.raises(kt.WrongPhase, match="given up when another optimizer stepped"):
        first.step()
    first.load_state_dict(saved)
    first.step()
    with pytest.raises(kt.WrongPhase, match="given up when another optimizer stepped"):
        copy.deepcopy(second.state_dict())
