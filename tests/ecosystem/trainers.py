"""transformers' Trainer, as users start it."""

from __future__ import annotations

from typing import Any

import torch
from support.training import history, trainer
from transformers import PrinterCallback, Trainer
from transformers.trainer_utils import get_last_checkpoint

from ecosystem.case import Case, Figures, Side, joined, logits_of, loop

STEPS = 10


def run(made: Trainer) -> Figures:
    made.remove_callback(PrinterCallback)
    made.train()
    entries = [entry for entry in made.state.log_history if "grad_norm" in entry]
    assert entries
    told = [float(entry[name]) for entry in entries for name in ("rewards/margins", "kl") if name in entry]
    logits = torch.cat([logits_of(made.model).flatten(), torch.tensor(told)])
    return Figures([entry["loss"] for entry in entries], [float(entry["grad_norm"]) for entry in entries], logits)


def _plain(side: Side, name: str = "out", **changes: Any) -> Trainer:
    model = side.adapted()
    return trainer(model, side.folder / name, **{"max_steps": STEPS, "learning_rate": 1e-3, **changes})


def plain(side: Side) -> Figures:
    return run(_plain(side))


def resumed(side: Side) -> Figures:
    first = _plain(side, save_strategy="steps", save_steps=4, max_steps=8)
    first.train()
    second = _plain(side, max_steps=8)
    second.train(resume_from_checkpoint=str(side.folder / "out" / "checkpoint-4"))
    steps = history(second)
    assert len(steps) == 8
    return Figures([loss for loss, _, _ in steps], [norm for _, norm, _ in steps], logits_of(second.model))


def resumed_from_the_other(side: Side) -> Figures:
    """Trained and saved in process, and resumed on this side."""
    local = Side(side.checkpoint, side.folder, None)
    _plain(local, save_strategy="steps", save_steps=4, max_steps=4).train()
    second = _plain(side, max_steps=8)
    second.train(resume_from_checkpoint=get_last_checkpoint(str(side.folder / "out")))
    return Figures([loss for loss, _, _ in history(second)], (), logits_of(second.model))


def resumed_in_process(side: Side) -> Figures:
    """Trained and saved on this side, and resumed in process."""
    _plain(side, save_strategy="steps", save_steps=4, max_steps=4).train()
    second = _plain(Side(side.checkpoint, side.folder, None), max_steps=8)
    second.train(resume_from_checkpoint=get_last_checkpoint(str(side.folder / "out")))
    return Figures([loss for loss, _, _ in history(second)], (), logits_of(second.model))


def best_model(side: Side) -> Figures:
    """And training on with the optimizer that went further: its moments are not those of the best weights."""
    model = side.adapted()
    made = trainer(
        model,
        side.folder / "out",
        eval_rows=8,
        max_steps=8,
        learning_rate=5e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the best is an early one
    )
    made.train()
    assert made.state.best_model_checkpoint is not None
    assert not made.state.best_model_checkpoint.endswith("-8")
    evaluated = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    best = Figures(evaluated, (), logits_of(model))
    return joined(best, loop(model, made.optimizer, 3))


def weights_only(side: Side) -> Figures:
    _plain(side, save_strategy="steps", save_steps=2, max_steps=2, save_only_model=True).train()
    files = sorted(path.name for path in (side.folder / "out" / "checkpoint-2").iterdir())
    return Figures(logits=torch.tensor([float(sum(name.encode())) for name in files]))


def saved_model(side: Side) -> Figures:
    """Trainer.save_model of a model without an adapter writes a whole checkpoint."""
    made = trainer(side.base(), side.folder / "out")
    made.save_model(str(side.folder / "whole"))
    return Figures(logits=logits_of(Side(side.folder / "whole", side.folder, None).base()))


CASES = [
    Case("Trainer", "plain", plain),
    Case("Trainer", "resumed from its checkpoint", resumed),
    Case("T10", "Trainer.save_model without an adapter", saved_model),
    Case("T20", "save_only_model", weights_only),
    Case("T25", "load_best_model_at_end", best_model),
    Case("T26", "stock's checkpoint resumed on the server", resumed_from_the_other),
    Case("T26", "a checkpoint resumed in process", resumed_in_process),
]
