"""One thing a trainer does, what it leads to on each side, and how far the two sides are apart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import torch
from kt_expert_client.parameters.tensor import RemoteTensor
from peft import PeftModel, get_peft_model
from support.models import random_tokens
from support.training import SEED, lora_config
from transformers import AutoModelForCausalLM

LOSS_BOUND = 2e-6  # of an fp32 loss near 5: a few units in its last place
NORM_BOUND = 2e-6  # relative
LOGIT_BOUND = 1e-5  # of the largest; Adam divides by the size of small gradients, and so makes much of their rounding


@dataclass(frozen=True, slots=True)
class Side:
    """Where the experts are: in process, or at an address. `folder` is this side's own, and empty."""

    checkpoint: Path
    folder: Path
    address: str | None
    options: kt.RunOptions | None = None

    def base(self, **kwargs: Any) -> Any:
        torch.manual_seed(SEED)
        if self.address is None:
            settings = {"dtype": torch.float32, "experts_implementation": "eager", **kwargs}
            return AutoModelForCausalLM.from_pretrained(self.checkpoint, **settings)
        with self.loading():
            model = AutoModelForCausalLM.from_pretrained(self.checkpoint, **{"dtype": torch.float32, **kwargs})
        named = model.named_parameters()
        assert all(isinstance(parameter, RemoteTensor) == (".experts." in name) for name, parameter in named)
        return model

    def adapted(self, **changes: Any) -> PeftModel:
        """With LoRA of random values, so that none is zero."""
        model = get_peft_model(self.base(), lora_config(**changes))
        randomise(model)
        return model

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Models loaded inside have their experts on this side."""
        return kt.offload_experts(self.address, self.options) if self.address else contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Figures:
    """What is compared. Numbers beside losses and norms go to `logits`."""

    losses: Sequence[float] = ()
    norms: Sequence[float] = ()
    logits: torch.Tensor = field(default_factory=lambda: torch.zeros(0))


@dataclass(frozen=True, slots=True)
class Case:
    """A row of the table of cases, and a way to meet it. With `refused`, what the error says; `stock_refuses` where the same
    is refused in process."""

    row: str
    what: str
    run: Callable[[Side], Figures]
    refused: str = ""
    stock_refuses: bool = False
    options: kt.RunOptions | None = None
    note: str = ""
    loss_bound: float = LOSS_BOUND
    norm_bound: float = NORM_BOUND
    logit_bound: float = LOGIT_BOUND

    def __str__(self) -> str:
        return f"{self.row}-{self.what}".replace(" ", "-")


@dataclass(frozen=True, slots=True)
class Difference:
    """Largest differences: of losses absolute, of norms relative, of logits as a part of the largest."""

    loss: float
    norm: float
    logit: float


def difference(got: Figures, expected: Figures) -> Difference:
    """Raises AssertionError where one side has other figures than the other, or a number is none."""
    assert len(got.losses) == len(expected.losses)
    assert len(got.norms) == len(expected.norms)
    assert got.logits.shape == expected.logits.shape
    finite = [*got.losses, *got.norms, *expected.losses, *expected.norms]
    assert all(torch.isfinite(torch.tensor(finite)))
    losses = [abs(ours - theirs) for ours, theirs in zip(got.losses, expected.losses, strict=True)]
    norms = [abs(ours - theirs) / max(abs(theirs), 1e-12) for ours, theirs in zip(got.norms, expected.norms, strict=True)]
    logit = 0.0
    if expected.logits.numel():
        assert torch.equal(got.logits.isnan(), expected.logits.isnan())
        ours, theirs = (each.logits[~expected.logits.isnan()] for each in (got, expected))
        if theirs.numel():
            logit = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
    return Difference(max(losses, default=0.0), max(norms, default=0.0), logit)


def lora_of(model: Any, part: str = "lora_") -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if part in name}


def randomise(model: Any, seed: int = 3, part: str = "lora_", scale: float = 0.1) -> None:
    """By name: the order of parameters in two models may differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(lora_of(model, part).items()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def loss_of(model: Any, seed: int = 1) -> torch.Tensor:
    tokens = random_tokens(2, 10, seed=seed)
    found: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
    return found


def logits_of(model: Any, **kwargs: Any) -> torch.Tensor:
    was_training = model.training
    model.eval()
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=random_tokens(2, 9), **kwargs).logits
    model.train(was_training)
    return values.float()


def trainable(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(model: Any, rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=rate)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=0.05, momentum=0.9)


def loop(
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: int = 10,
    *,
    before_step: Callable[[Any], object] = lambda _: None,
    loss: Callable[[Any, int], torch.Tensor] = loss_of,
    first: int = 0,
) -> Figures:
    """A plain loop of 10 steps or as many as are asked for; norms are those before anything was clipped."""
    losses, norms = [], []
    for step in range(first, first + steps):
        value = loss(model, step)
        value.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        before_step(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return Figures(losses, norms, logits_of(model))


def joined(*figures: Figures) -> Figures:
    return Figures(
        [loss for each in figures for loss in each.losses],
        [norm for each in figures for norm in each.norms],
        torch.cat([each.logits.flatten() for each in figures]),
    )
