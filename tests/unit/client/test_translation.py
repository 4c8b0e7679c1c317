"""How torch's optimizers and the environment translate into what the server is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import Adam, AdamW, RunOptions, Sgd
from kt_expert_client.optimizers import Update, translate
from kt_expert_proto.environment import RUN_OPTIONS

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Derived(torch.optim.AdamW):
    """Only a name of its own."""


class Overriding(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def parameter() -> torch.nn.Parameter:
    made = torch.nn.Parameter(torch.zeros(1))
    made.grad = torch.ones(1)
    return made


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (torch.optim.AdamW, AdamW(1e-3)),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.5), betas=(0.5, 0.75)), AdamW(0.5, 0.5, 0.75)),
        (lambda p: torch.optim.AdamW(p, fused=True, weight_decay=0.25), AdamW(1e-3, weight_decay=0.25)),
        (lambda p: torch.optim.Adam(p, weight_decay=0.5), Adam(1e-3, weight_decay=0.5)),
        (lambda p: torch.optim.Adam(p, decoupled_weight_decay=True), AdamW(1e-3, weight_decay=0.0)),
        (Derived, AdamW(1e-3)),
        (lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.25, nesterov=True), Sgd(0.5, 0.25, nesterov=True)),
        (lambda p: torch.optim.SGD(p, lr=0.5, dampening=0.25, weight_decay=0.5), Sgd(0.5, 0.0, 0.25, 0.5)),
    ],
)
def test_torchs_optimizers_translate(make: Make, expected: Update) -> None:
    optimizer = make([parameter()])
    assert translate(optimizer, optimizer.param_groups[0]) == expected


def test_a_schedule_is_seen_and_leaves_the_optimizer_known() -> None:
    optimizer = torch.optim.SGD([parameter()], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    optimizer.step()
    schedule.step()
    assert translate(optimizer, optimizer.param_groups[0]) == Sgd(0.5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: torch.optim.AdamW(p, maximize=True), "has no maximize"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "has no amsgrad"),
        (torch.optim.Adafactor, "the numbers would differ"),
        (lambda p: Overriding(p, lr=1.0), "Overriding has a step of its own"),
        (torch.optim.RMSprop, r"optimizer is torch\.optim\.rmsprop\.RMSprop"),
    ],
)
def test_what_the_server_cannot_do_is_refused(make: Make, sentence: str) -> None:
    optimizer = make([parameter()])
    with pytest.raises(kt.UnsupportedModel, match=sentence):
        translate(optimizer, optimizer.param_groups[0])


def test_options_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RunOptions.from_environment() == RunOptions()
    for name, value in (("TICKETS", "inputs"), ("MOMENTS", "bf16"), ("DROPOUT", "0.25"), ("ALONE", "1")):
        monkeypatch.setenv(f"KT_EXPERT_{name}", value)
    assert RunOptions.from_environment() == RunOptions("inputs", "bf16", 0.25, alone=True)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("KT_EXPERT_ALONE", "yes", "KT_EXPERT_ALONE is 'yes', expected 0 or 1"),
        ("KT_EXPERT_NON_FINITE", "look", "non_finite is 'look', expected one of allow, refuse"),
        ("KT_EXPERT_LORA_LOCATION", "gpu", "lora_location is 'gpu', expected one of server, trainer"),
        ("KT_EXPERT_DROPOUT", "much", "KT_EXPERT_DROPOUT is 'much', expected a number"),
        ("KT_EXPERT_DROPOUT", "1.0", r"dropout is 1.0, expected a probability.*KT_EXPERT_DROPOUT=1.0"),
        ("KT_EXPERT_DROPOUT", "nan", "dropout is nan"),
        ("KT_EXPERT_TICKETS", "all", r"tickets is 'all', expected one of activations, inputs.*KT_EXPERT_TICKETS=all"),
        ("KT_EXPERT_MOMENTS", "fp8", r"moments is 'fp8', expected one of fp32, bf16.*KT_EXPERT_MOMENTS=fp8"),
    ],
)
def test_a_variable_without_a_meaning_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(kt.InvalidRequest, match=sentence):
        RunOptions.from_environment()


def test_every_option_has_a_variable() -> None:
    assert {field.name for field in dataclasses.fields(RunOptions)} == set(RUN_OPTIONS)
