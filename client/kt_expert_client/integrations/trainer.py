"""A callback that every transformers Trainer gets: it keeps the server's optimizer state in the trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kt_expert_client.integrations import moments_file
from kt_expert_client.integrations.experts import RemoteExperts
from kt_expert_client.offload import ModelOffload


class KtExpertCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no annotations
    """Does nothing for models without remote experts."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        del control
        offload = _offload_of(kwargs.get("model"))
        if offload is None or not offload.lora or not state.is_world_process_zero:
            return
        directory = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        directory.mkdir(parents=True, exist_ok=True)
        moments = moments_file.Moments(offload.download(moments=True), offload.run.steps_taken)
        moments_file.write(directory, moments)


def install() -> None:
    """Adds the callback to those every Trainer starts with."""
    from transformers import trainer

    if KtExpertCallback not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(KtExpertCallback)


def _offload_of(model: object) -> ModelOffload | None:
    if not isinstance(model, nn.Module):
        return None
    return next((module.kt_offload for module in model.modules() if isinstance(module, RemoteExperts)), None)
