"""Loops of one's own: optimizers, groups, clipping, and what autograd collects."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import accelerate
import kt_expert_client as kt
import torch
from peft.optimizers import create_loraplus_optimizer
from support.models import random_tokens
from transformers.optimization import Adafactor as TransformersAdafactor

from ecosystem.case import Case, Figures, Side, adamw, joined, logits_of, loop, lora_of, loss_of, sgd, trainable

clip_norm, clip_value = torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_


def with_optimizer(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[[Side], Figures]:
    def run(side: Side) -> Figures:
        model = side.adapted()
        return loop(model, make(model))

    return run


def clipped(change: Callable[[Any], object]) -> Callable[[Side], Figures]:
    def run(side: Side) -> Figures:
        model = side.adapted()
        return loop(model, adamw(model), before_step=change)

    return run


def frozen(part: str) -> Callable[[Side], Figures]:
    def run(side: Side) -> Figures:
        model = side.adapted()
        for name, parameter in lora_of(model).items():
            parameter.requires_grad_(part not in name)
        return loop(model, adamw(model))

    return run


def groups_of_a_and_b(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([
        {"params": list(lora_of(model, "lora_A").values()), "lr": 1e-3, "weight_decay": 0.1},
        {"params": list(lora_of(model, "lora_B").values()), "lr": 3e-3, "betas": (0.8, 0.9)},
    ])  # fmt: skip


def a_group_of_experts(model: Any) -> torch.optim.Optimizer:
    experts = [p for name, p in lora_of(model).items() if ".experts." in name]
    others = [p for name, p in lora_of(model).items() if ".experts." not in name]
    assert experts
    return torch.optim.AdamW([{"params": experts, "lr": 3e-3}, {"params": others, "lr": 1e-3}])


def passes_that_collect_little(side: Side) -> Figures:
    model = side.adapted()
    embeddings = model.get_input_embeddings().weight

    def adversarial(_: Any) -> None:
        embeddings.requires_grad_(True)
        torch.autograd.grad(loss_of(model, 2), [embeddings])
        value = loss_of(model, 3)
        value.backward(inputs=[next(p for name, p in lora_of(model).items() if "q_proj" in name)], retain_graph=True)
        value.backward(inputs=[p for name, p in lora_of(model, "lora_B").items()])
        embeddings.requires_grad_(False)

    return loop(model, adamw(model), before_step=adversarial)


def adversarial_embeddings(side: Side) -> Figures:
    """Gradients of the embeddings between two backwards of an accumulation, as FGM takes them."""
    model, tokens = side.adapted(), random_tokens(2, 10)
    optimizer, losses, norms = sgd(model), [], []
    for _ in range(5):
        embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
        value = model(inputs_embeds=embedded, labels=tokens).loss
        (slope,) = torch.autograd.grad(value, [embedded], retain_graph=True)
        value.backward()
        attacked = embedded + 0.1 * slope / slope.norm()
        model(inputs_embeds=attacked, labels=tokens).loss.backward()
        norms.append(float(clip_norm(model.parameters(), 1.0)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return Figures(losses, norms, logits_of(model))


def two_losses_on_one_graph(side: Side) -> Figures:
    model = side.adapted()
    optimizer, losses, norms = adamw(model), [], []
    for step in range(4):
        value = loss_of(model, step)
        value.backward(retain_graph=True)
        (value * 0.5).backward()
        norms.append(float(clip_norm(model.parameters(), 1e9)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return Figures(losses, norms, logits_of(model))


def gradient_scaler(side: Side) -> Figures:
    model = side.adapted()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    losses, norms = [], []
    for step in range(6):
        value = loss_of(model, step)
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        norms.append(float(clip_norm(model.parameters(), 0.05)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(value.detach()))
    return Figures(losses, norms, logits_of(model))


def accelerated(side: Side, *, save: bool) -> Figures:
    model = side.adapted()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    wrapped, optimizer = accelerator.prepare(model, adamw(model))
    losses, norms = [], []

    def steps(first: int, count: int) -> None:
        for step in range(first, first + count):
            with accelerator.accumulate(wrapped):
                value = loss_of(wrapped, step)
                accelerator.backward(value)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(wrapped.parameters(), 0.1)))
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(value.detach()))

    steps(0, 6)
    if save:
        accelerator.save_state(str(side.folder / "state"))
        steps(6, 4)
        accelerator.load_state(str(side.folder / "state"))
    steps(6, 4)
    return Figures(losses, norms, logits_of(wrapped))


def an_interrupted_accumulation(side: Side) -> Figures:
    """Under accelerate, and then a plain loop in the same process."""
    model = side.adapted()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    wrapped, optimizer = accelerator.prepare(model, adamw(model))
    with accelerator.accumulate(wrapped):
        accelerator.backward(loss_of(wrapped, 1))
        optimizer.step()
    model.zero_grad()
    return loop(model, adamw(model), before_step=lambda each: clip_norm(each.parameters(), 0.05))


def moments_go_to_a_new_optimizer(side: Side) -> Figures:
    model = side.adapted()
    first = adamw(model)
    before = loop(model, first, 4)
    second = adamw(model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    return joined(before, loop(model, second, 4, first=4))


def full_fine_tuning(side: Side) -> Figures:
    """Every parameter. The server computes with the bf16 form of its masters; before the first step nothing is rounded."""
    model = side.base()
    model.requires_grad_(True)
    value = loss_of(model)
    value.backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    return Figures([float(value.detach())], [norm], logits_of(model))


def a_gradient_of_nan(side: Side) -> Figures:
    """One batch spoils the gradients; the loop clears them, as those that look for NaN do, and goes on."""
    model = side.adapted()
    (loss_of(model) * float("nan")).backward()
    assert not torch.isfinite(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    model.zero_grad()
    return loop(model, adamw(model), 4)


def a_step_with_nan(side: Side) -> Figures:
    model = side.adapted()
    (loss_of(model) * float("nan")).backward()
    clip_norm(model.parameters(), 1.0)
    adamw(model).step()
    return Figures(logits=logits_of(model))


def a_token_of_nan(side: Side) -> Figures:
    model, tokens = side.adapted(), random_tokens(2, 9)
    embedded = model.get_input_embeddings()(tokens).detach().clone()
    embedded[0, -1] = float("nan")
    with torch.no_grad():
        logits = model(inputs_embeds=embedded).logits
    return Figures(logits=logits)


def by_name(side: Side) -> Figures:
    model = side.adapted()
    experts = next(each for each in model.modules() if hasattr(each, "num_experts") and hasattr(each, "act_fn"))
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [1, 0]])
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return Figures(logits=experts(top_k_weights=weights, top_k_index=index, hidden_states=hidden))


def another_top_k(side: Side) -> Figures:
    model = side.base(num_experts_per_tok=5)
    return Figures([float(loss_of(model).detach())], (), logits_of(model))


def attach_after_peft(side: Side) -> Figures:
    model = Side(side.checkpoint, side.folder, None).adapted()
    if side.address:
        kt.attach(model, side.address)
    return loop(model, sgd(model))


def attach_before_peft(side: Side) -> Figures:
    local = Side(side.checkpoint, side.folder, None)
    if side.address is None:
        model = local.adapted()
    else:
        from peft import get_peft_model
        from support.training import lora_config

        from ecosystem.case import randomise

        base = local.base()
        kt.attach(base, side.address)
        model = get_peft_model(base, lora_config())
        randomise(model)
    return loop(model, sgd(model))


def checkpointed(**settings: Any) -> Callable[[Side], Figures]:
    def run(side: Side) -> Figures:
        model = side.adapted()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
        model.enable_input_require_grads()
        model.train()
        return loop(model, adamw(model))

    return run


def generated_between_steps(side: Side) -> Figures:
    model = side.adapted()
    optimizer, parts = sgd(model), []
    for step in range(3):
        parts.append(loop(model, optimizer, 1, first=step))
        made = model.generate(input_ids=random_tokens(2, 4), max_new_tokens=6, do_sample=False, pad_token_id=0)
        parts.append(Figures(logits=made.float()))
    return joined(*parts)


def bf16_model(side: Side) -> Figures:
    model = side.base(dtype=torch.bfloat16, num_experts_per_tok=8)
    return Figures([float(loss_of(model).detach())], (), logits_of(model))


def bf16_autocast(side: Side) -> Figures:
    model = side.base(num_experts_per_tok=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return Figures([float(loss_of(model).detach())], (), logits_of(model))


def _muon(model: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(trainable(model), lr=1e-3)


def _named(name: str, **settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
    def make(model: Any) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, name)(trainable(model), **{"lr": 1e-3, **settings})
        return made

    return make


class Lion(torch.optim.Optimizer):
    """Chen et al., 2023, algorithm 2: as users bring optimizers of their own."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("exp_avg", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * (average * first + parameter.grad * (1 - first)).sign())
                average.mul_(second).add_(parameter.grad * (1 - second))


def muon_and_adamw(model: Any) -> Any:
    """Muon on matrices and AdamW on the rest, which is nothing here but what a group by name says."""
    attention = [p for name, p in lora_of(model).items() if ".experts." not in name]
    experts = [p for name, p in lora_of(model).items() if ".experts." in name]
    return Both(torch.optim.Muon(experts, lr=1e-3), torch.optim.AdamW(attention, lr=1e-3))


class Both:
    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers

    def step(self) -> None:
        for each in self._optimizers:
            each.step()

    def zero_grad(self) -> None:
        for each in self._optimizers:
            each.zero_grad()


def transformers_adafactor(model: Any) -> torch.optim.Optimizer:
    return TransformersAdafactor(trainable(model), lr=1e-3, relative_step=False)


OPTIMIZERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "torch's Adafactor": ("T13", _named("Adafactor")),
    "RMSprop": ("T13", _named("RMSprop", lr=1e-4)),
    "Adagrad": ("T13", _named("Adagrad")),
    "NAdam": ("T13", _named("NAdam")),
    "AdamW with amsgrad": ("T13", _named("AdamW", amsgrad=True)),
    "AdamW that maximises": ("T13", _named("AdamW", maximize=True)),
    "transformers' Adafactor": ("T13", transformers_adafactor),
    "an optimizer of one's own": ("T13", lambda model: Lion(trainable(model), 1e-4)),
    "Muon alone": ("T35", _muon),
    "Muon and AdamW": ("T35", muon_and_adamw),
}
ROUNDING = "rounding: as far apart as stock's own implementations are; every expert is chosen, so that none changes"
REFUSED = r"lora_location='trainer'"
# Muon's own arithmetic is bf16, which makes much of fp32's rounding: stock's experts loop and its batched form, compared
# with each other, are as far apart.
IN_BF16 = {"T35": {"loss_bound": 1e-4, "norm_bound": 5e-4, "logit_bound": 5e-4}}
TRAINER = kt.RunOptions(lora_location="trainer")
ANY_OPTIMIZER = [
    each
    for what, (row, make) in OPTIMIZERS.items()
    for each in (
        Case(row, f"{what}, LoRA on the server", with_optimizer(make), refused=REFUSED),
        Case(row, f"{what}, LoRA in the trainer", with_optimizer(make), options=TRAINER, **IN_BF16.get(row, {})),
    )
]
CASES = [
    *ANY_OPTIMIZER,
    Case("T4", "LoRA+", with_optimizer(
        lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16))),
    Case("T4", "groups of A and B", with_optimizer(groups_of_a_and_b)),
    Case("T4", "a group by .experts.", with_optimizer(a_group_of_experts)),
    Case("T5", "experts frozen by name", frozen(".experts.")),
    Case("T5", "A frozen by name", frozen("lora_A")),
    Case("T5", "a layer frozen by name", frozen("layers.1.")),
    Case("T6", "clip_grad_value_", clipped(lambda model: clip_value(model.parameters(), 1e-3))),
    Case("T6", "clip_grad_norm_, 2", clipped(lambda model: clip_norm(model.parameters(), 0.01))),
    Case("T6", "clip_grad_norm_, 1", clipped(lambda model: clip_norm(model.parameters(), 0.01, norm_type=1.0))),
    Case("T6", "clip_grad_norm_, inf", clipped(lambda model: clip_norm(model.parameters(), 0.001, norm_type=float("inf")))),
    Case("T6", "clip_grad_norm_ of each", clipped(
        lambda model: [clip_norm([p], 0.001) for p in model.parameters() if p.grad is not None])),
    Case("T6", "scaled and clamped by hand", clipped(
        lambda model: [p.grad.mul_(0.5).clamp_(max=1e-4) for p in model.parameters() if p.grad is not None])),
    Case("T6", "divided by hand", clipped(lambda model: [p.grad.div_(3) for p in model.parameters() if p.grad is not None])),
    Case("T6", "some zeroed by hand", clipped(lambda model: [p.grad.zero_() for p in lora_of(model, "lora_A").values()])),
    Case("T7", "accelerate", lambda side: accelerated(side, save=False)),
    Case("T7", "save_state and load_state", lambda side: accelerated(side, save=True)),
    Case("T9", "all parameters trainable, first gradients", full_fine_tuning, norm_bound=2e-2),
    Case("T12", "attach after get_peft_model", attach_after_peft),
    Case("T12", "attach before get_peft_model", attach_before_peft),
    Case("T19", "bf16 model", bf16_model, note=ROUNDING, loss_bound=2e-3, logit_bound=2e-2),
    Case("T19", "bf16 autocast", bf16_autocast, note=ROUNDING, loss_bound=2e-3, logit_bound=2e-2),
    Case("T21", "keyword arguments in another order", by_name),
    Case("T23", "autograd.grad and backward(inputs)", passes_that_collect_little),
    Case("T23", "adversarial embeddings", adversarial_embeddings),
    Case("T24", "two losses on one graph", two_losses_on_one_graph),
    Case("T26", "an optimizer's state goes to another", moments_go_to_a_new_optimizer),
    Case("T28", "a gradient of NaN, cleared", a_gradient_of_nan),
    Case("T28", "a step with NaN", a_step_with_nan),
    Case("T28", "a token of NaN", a_token_of_nan),
    Case("T29", "an interrupted accumulation under accelerate", an_interrupted_accumulation),
    Case("T33", "another top-k", another_top_k),
    Case("loop", "GradScaler", gradient_scaler),
    Case("loop", "checkpointing, reentrant", checkpointed(use_reentrant=True)),
    Case("loop", "checkpointing, not reentrant", checkpointed(use_reentrant=False)),
    Case("loop", "generate between steps", generated_between_steps),
]  # fmt: skip
