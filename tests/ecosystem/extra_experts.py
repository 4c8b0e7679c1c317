"""Small experts beside the routed ones, as kt-kernel's LoRA experts are. Stock has none: its side writes them out in torch."""

from __future__ import annotations

import dataclasses
from typing import Any

import kt_expert_client as kt
import torch
from peft import PeftModel, get_peft_model
from support.training import lora_config, trainer
from torch import nn

from ecosystem.case import Case, Figures, Side, adamw, logits_of, loop, randomise
from ecosystem.table import OLDER
from ecosystem.trainers import run

NUMBER, SIZE = 2, 24
OPTIONS = kt.RunOptions(lora_experts=NUMBER, lora_expert_size=SIZE)
_NAME = "lora_experts"


class _Extra(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        for index in range(NUMBER):
            mlp = nn.ModuleDict(
                {
                    "le_gate": nn.Linear(hidden, SIZE, bias=False),
                    "le_up": nn.Linear(hidden, SIZE, bias=False),
                    "le_down": nn.Linear(SIZE, hidden, bias=False),
                }
            )
            nn.init.zeros_(mlp["le_down"].weight)
            self.add_module(str(index), mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for mlp in self.children():
            each: Any = mlp
            total = total + each["le_down"](nn.functional.silu(each["le_gate"](x)) * each["le_up"](x))
        return total / NUMBER


def _base(side: Side) -> Any:
    model = side.base()
    if side.address is None:
        for layer in model.model.layers:
            layer.mlp.add_module(_NAME, _Extra(model.config.hidden_size))
            layer.mlp.register_forward_hook(lambda block, args, output: output + block.lora_experts(args[0]))
    return model


def _adapted(side: Side) -> Any:
    model = get_peft_model(_base(side), lora_config(modules_to_save=[_NAME]))
    randomise(model)
    for name, parameter in model.named_parameters():
        if "original_module" in name and "le_down" in name:
            parameter.data.zero_()  # as it was before PEFT wrapped it
    return model


def trained(side: Side) -> Figures:
    model = _adapted(side)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and _NAME in name]
    assert len(names) == 3 * NUMBER * model.config.num_hidden_layers
    return loop(model, adamw(model))


def by_trainer(side: Side) -> Figures:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    return run(trainer(_adapted(side), side.folder / "out", max_steps=6, learning_rate=1e-3, **settings))


def recomputed_by_reentry(side: Side) -> Figures:
    model = _adapted(side)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    return loop(model, adamw(model), 4)


def saved_and_loaded(side: Side) -> Figures:
    """In kt-kernel's names, and loaded by the other side too."""
    model = _adapted(side)
    loop(model, adamw(model), 3)
    model.save_pretrained(str(side.folder / "adapter"))
    loaded = PeftModel.from_pretrained(_base(side), str(side.folder / "adapter"), is_trainable=True)
    if OLDER and side.address is None and not torch.equal(logits_of(loaded), logits_of(model)):
        return Figures()  # PEFT 0.18 drops them without a word: on the server's side that is refused
    assert torch.equal(logits_of(loaded), logits_of(model))
    in_process = PeftModel.from_pretrained(_base(dataclasses.replace(side, address=None)), str(side.folder / "adapter"))
    torch.testing.assert_close(logits_of(in_process), logits_of(model), atol=1e-5, rtol=0)
    return loop(loaded, adamw(loaded), 3)


def disabled(side: Side) -> Figures:
    model = _adapted(side)
    with model.disable_adapter():
        without = logits_of(model)
    torch.testing.assert_close(without, logits_of(side.base()), atol=1e-6, rtol=0)
    return Figures(logits=without)


CASES = [
    Case("Extra experts", "trained with LoRA", trained, options=OPTIONS),
    Case("Extra experts", "Trainer, with checkpointing", by_trainer, options=OPTIONS),
    Case("Extra experts", "with reentrant checkpointing", recomputed_by_reentry, options=OPTIONS),
    Case("Extra experts", "saved and loaded", saved_and_loaded, options=OPTIONS),
    Case("Extra experts", "disabled with the adapter", disabled, options=OPTIONS),
]
