"""How a pass is made: what checkpointing keeps, compiled models, pipelines, evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from kt_expert_client.offload import ModelOffload
from kt_expert_client.run import Run
from support.models import random_tokens
from support.tokenizer import tokenizer
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import pipeline

from ecosystem.case import Case, Figures, Side, adamw, joined, logits_of, loop, lora_of, loss_of

_STEPS = 5


def selective(*, keeps_experts: bool) -> Callable[[Side], Figures]:
    """Checkpointing that keeps attention's products and, as asked, the experts' outputs."""

    def choose(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        del context, args, kwargs
        kept = [torch.ops.aten.mm.default, *([torch.ops.kt_expert.experts.default] if keeps_experts else [])]
        return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE

    def run(side: Side) -> Figures:
        model = side.adapted()
        contexts = functools.partial(create_selective_checkpoint_contexts, choose)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        model.enable_input_require_grads()
        model.train()
        with patch.object(Run, "submit_forward", autospec=True, side_effect=Run.submit_forward) as forwards:
            figures = loop(model, adamw(model), _STEPS)
        layers = model.config.num_hidden_layers
        passes = _STEPS * (1 if keeps_experts else 2) + 1  # the last for its logits
        assert side.address is None or forwards.call_count == layers * passes
        return figures

    return run


def compiled(side: Side) -> Figures:
    model = side.adapted()
    whole = torch.compile(model, backend="aot_eager")
    trained = loop(whole, adamw(model), _STEPS)
    return joined(trained, Figures(logits=logits_of(model)))


def in_a_pipeline(side: Side) -> Figures:
    model = side.adapted()
    generate = pipeline("text-generation", model=model.base_model.model, tokenizer=tokenizer())
    made = generate("w3 w5 w8", max_new_tokens=8, do_sample=False, return_tensors=True)
    return Figures(logits=torch.tensor([float(token) for token in made[0]["generated_token_ids"]]))


def evaluated(side: Side) -> Figures:
    """Under eval() alone, gradients are recorded: what the server keeps for them ends with them."""
    model = side.adapted()
    before = loop(model, adamw(model), 2)
    model.eval()
    losses = [float(loss_of(model, seed).detach()) for seed in range(4)]
    offload = getattr(model.base_model.model, "kt_expert_offload", None)
    assert side.address is None or isinstance(offload, ModelOffload)
    assert offload is None or offload.parameters.open_tickets == 0
    model.train()
    return joined(before, Figures(losses), loop(model, adamw(model), 2))


def several_losses_before_a_backward(side: Side) -> Figures:
    """Two passes whose graphs are both alive, as contrastive losses have them."""

    def difference(model: Any, step: int) -> torch.Tensor:
        first, second = (model(input_ids=random_tokens(2, 7, seed=seed)).logits for seed in (step, step + 50))
        return (first - second).square().mean()

    model = side.adapted()
    return loop(model, adamw(model), _STEPS, loss=difference)


def gradients_set_aside(side: Side) -> Figures:
    """As ZeRO does: kept while .grad is None, looked at, kept over a step that passes them over, and taken by the next."""
    model = side.adapted()
    optimizer = adamw(model)
    norms = []
    for step in range(_STEPS):
        loss_of(model, step).backward()
        aside = {}
        for parameter in lora_of(model, "lora_A").values():
            aside[parameter], parameter.grad = parameter.grad, None
        norms += [float(torch.linalg.vector_norm(gradient)) for gradient in aside.values() if gradient is not None]
        optimizer.step()
        norms += [float(torch.linalg.vector_norm(gradient)) for gradient in aside.values() if gradient is not None]
        for parameter, gradient in aside.items():
            parameter.grad = gradient
        for parameter in lora_of(model, "lora_B").values():
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
    return Figures(norms=norms, logits=logits_of(model))


CASES = [
    Case("Passes", "selective checkpointing, experts kept", selective(keeps_experts=True)),
    Case("Passes", "selective checkpointing, experts computed again", selective(keeps_experts=False)),
    Case("Passes", "torch.compile", compiled),
    Case("Passes", "pipeline()", in_a_pipeline),
    Case("Passes", "evaluation that records gradients", evaluated),
    Case("Passes", "two passes before a backward", several_losses_before_a_backward),
    Case("Passes", "gradients set aside and put back", gradients_set_aside),
]
