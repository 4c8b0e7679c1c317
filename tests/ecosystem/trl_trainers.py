"""TRL's trainers, from scratch and from an adapter that SFT left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.tokenizer import tokenizer
from support.training import lora_config
from transformers import AutoModelForSequenceClassification, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from ecosystem.case import Case, Figures, Side, randomise
from ecosystem.trainers import STEPS, run

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "max_grad_norm": 0.1,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def words(row: int, begin: int, count: int) -> str:
    return " ".join(f"w{(row * 17 + begin * 5 + index * 7) % 120}" for index in range(count))


def rows(kind: str) -> Dataset:
    made = []
    for row in range(48):
        prompt, good, bad = words(row, 0, 4), words(row, 4, 6), words(row, 9, 5)
        if kind == "text":
            made.append({"text": f"{prompt} {good}"})
        elif kind == "preference":
            made.append({"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"})
        elif kind == "pairs":
            made.append({"chosen": f"{prompt} {good}", "rejected": f"{prompt} {bad}"})
        elif kind == "unpaired":
            made.append({"prompt": prompt, "completion": f" {good if row % 2 else bad}", "label": bool(row % 2)})
        else:
            made.append({"prompt": prompt})
    return Dataset.from_list(made)


def short_words(completions: list[str], **_: Any) -> list[float]:
    """A reward that depends on what was generated."""
    return [sum(len(word) for word in text.split()) / 10.0 for text in completions]


Make = Callable[[Any, Path], Trainer]


def sft(model: Any, folder: Path) -> Trainer:
    return SFTTrainer(
        model, args=SFTConfig(str(folder), max_length=12, **SETTINGS), train_dataset=rows("text"), processing_class=tokenizer()
    )


def dpo(model: Any, folder: Path) -> Trainer:
    return DPOTrainer(
        model, args=DPOConfig(str(folder), **SETTINGS), train_dataset=rows("preference"), processing_class=tokenizer()
    )


def kto(model: Any, folder: Path) -> Trainer:
    return KTOTrainer(
        model, args=KTOConfig(str(folder), **SETTINGS), train_dataset=rows("unpaired"), processing_class=tokenizer()
    )


def orpo(model: Any, folder: Path) -> Trainer:
    return ORPOTrainer(
        model, args=ORPOConfig(str(folder), max_length=24, **SETTINGS), train_dataset=rows("preference"),
        processing_class=tokenizer(),
    )  # fmt: skip


def grpo(model: Any, folder: Path) -> Trainer:
    settings = SETTINGS | {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    config = GRPOConfig(str(folder), num_generations=2, max_completion_length=6, beta=0.1, temperature=0.7, **settings)
    return GRPOTrainer(model, reward_funcs=short_words, args=config, train_dataset=rows("prompt"), processing_class=tokenizer())


def trained(make: Make) -> Callable[[Side], Figures]:
    def both(side: Side) -> Figures:
        torch.manual_seed(7)
        made = make(side.adapted(), side.folder / "out")
        return run(made)

    return both


def continued(make: Make) -> Callable[[Side], Figures]:
    """From an adapter that SFT left on disk, as the second stage of training is started."""

    def both(side: Side) -> Figures:
        first = side.adapted()
        run(sft(first, side.folder / "sft"))
        first.save_pretrained(side.folder / "adapter")
        model = PeftModel.from_pretrained(side.base(), side.folder / "adapter", is_trainable=True)
        torch.manual_seed(7)
        return run(make(model, side.folder / "out"))

    return both


def reward(side: Side) -> Figures:
    torch.manual_seed(5)
    settings: dict[str, Any] = {"dtype": torch.float32, "num_labels": 1}
    if side.address is None:
        settings["experts_implementation"] = "eager"
    with side.loading():
        base = AutoModelForSequenceClassification.from_pretrained(side.checkpoint, **settings)
    base.config.pad_token_id = 125
    torch.manual_seed(6)
    model = get_peft_model(base, lora_config(task_type="SEQ_CLS"))
    randomise(model)
    made = RewardTrainer(
        model, args=RewardConfig(str(side.folder), **SETTINGS), train_dataset=rows("pairs"), processing_class=tokenizer()
    )
    return run(made)


CASES = [
    Case("T1", "SFT, then DPO from its adapter", continued(dpo)),
    Case("T1", "SFT, then GRPO from its adapter", continued(grpo)),
    Case("T1", "SFT, then KTO from its adapter", continued(kto)),
    Case("T1", "SFT, then SFT from its adapter", continued(sft)),
    Case("TRL", "SFT", trained(sft)),
    Case("TRL", "DPO", trained(dpo)),
    Case("TRL", "GRPO", trained(grpo)),
    Case("TRL", "KTO", trained(kto)),
    Case("TRL", "ORPO", trained(orpo)),
    Case("TRL", "reward", reward),
]
