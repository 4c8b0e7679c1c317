"""transformers' Trainer and TRL's, as users start them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from support.models import VOCABULARY
from support.training import history, lora_config, trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, PrinterCallback, Trainer
from transformers.trainer_utils import get_last_checkpoint
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

from ecosystem.case import Case, Figures, Side, joined, logits_of, loop, randomise

STEPS = 10
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


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{index}": index for index in range(VOCABULARY - 3)} | {"<pad>": 125, "<eos>": 126, "<unk>": 127}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))  # noqa: S106  # a word of the vocabulary
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")  # noqa: S106


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
    def run(side: Side) -> Figures:
        torch.manual_seed(7)
        made = make(side.adapted(), side.folder / "out")
        return _run(made)

    return run


def continued(make: Make) -> Callable[[Side], Figures]:
    """From an adapter that SFT left on disk, as the second stage of training is started."""

    def run(side: Side) -> Figures:
        first = side.adapted()
        _run(sft(first, side.folder / "sft"))
        first.save_pretrained(side.folder / "adapter")
        model = PeftModel.from_pretrained(side.base(), side.folder / "adapter", is_trainable=True)
        torch.manual_seed(7)
        return _run(make(model, side.folder / "out"))

    return run


def _run(made: Trainer) -> Figures:
    made.remove_callback(PrinterCallback)
    made.train()
    entries = [entry for entry in made.state.log_history if "grad_norm" in entry]
    assert entries
    told = [float(entry[name]) for entry in entries for name in ("rewards/margins", "kl") if name in entry]
    logits = torch.cat([logits_of(made.model).flatten(), torch.tensor(told)])
    return Figures([entry["loss"] for entry in entries], [float(entry["grad_norm"]) for entry in entries], logits)


def reward(side: Side) -> Figures:
    torch.manual_seed(5)
    settings: dict[str, Any] = {"dtype": torch.float32, "num_labels": 1}
    if side.address is None:
        settings["experts_implementation"] = "eager"
    with side.loading():
        base = AutoModelForSequenceClassification.from_pretrained(side.checkpoint, **settings)
    base.config.pad_token_id = 125
    from peft import get_peft_model

    torch.manual_seed(6)
    model = get_peft_model(base, lora_config(task_type="SEQ_CLS"))
    randomise(model)
    made = RewardTrainer(
        model, args=RewardConfig(str(side.folder), **SETTINGS), train_dataset=rows("pairs"), processing_class=tokenizer()
    )
    return _run(made)


def _plain(side: Side, name: str = "out", **changes: Any) -> Trainer:
    model = side.adapted()
    return trainer(model, side.folder / name, **{"max_steps": STEPS, "learning_rate": 1e-3, **changes})


def plain(side: Side) -> Figures:
    return _run(_plain(side))


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
        learning_rate=2e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    made.train_dataset = [dict(row, labels=row["labels"].flip(0)) for row in made.train_dataset]  # what spoils evaluation
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
    Case("", "Trainer", plain),
    Case("", "Trainer, resumed from its checkpoint", resumed),
    Case("T1", "SFT, then DPO from its adapter", continued(dpo)),
    Case("T1", "SFT, then GRPO from its adapter", continued(grpo)),
    Case("T1", "SFT, then KTO from its adapter", continued(kto)),
    Case("T1", "SFT, then SFT from its adapter", continued(sft)),
    Case("", "TRL SFT", trained(sft)),
    Case("", "TRL DPO", trained(dpo)),
    Case("", "TRL GRPO", trained(grpo)),
    Case("", "TRL KTO", trained(kto)),
    Case("", "TRL ORPO", trained(orpo)),
    Case("", "TRL reward", reward),
    Case("T10", "Trainer.save_model without an adapter", saved_model),
    Case("T20", "save_only_model", weights_only),
    Case("T25", "load_best_model_at_end", best_model),
    Case("T26", "stock's checkpoint resumed on the server", resumed_from_the_other),
    Case("T26", "a checkpoint resumed in process", resumed_in_process),
]
