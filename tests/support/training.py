"""Stock Trainer runs, offloaded or not, from the same seeds."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from support.models import VOCABULARY, load_stock
from support.waiting import wait_until

SEED = 5
STEPS = 5


def lora_config(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    return LoraConfig(**settings | changes)


def adapted(
    directory: Path, address: str | None, config: LoraConfig | None = None, options: kt.RunOptions | None = None, **kwargs: Any
) -> PeftModel:
    """A PEFT model from fixed seeds; its experts are at `address`, or in process without one."""
    torch.manual_seed(SEED)
    if address is None:
        base = load_stock(directory)
    else:
        with kt.offload_experts(address, options):
            base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return get_peft_model(base, config or lora_config(), **kwargs)


def randomise_b(model: PeftModel) -> None:
    """Gives local LoRA B matrices values, so that adapters matter from the first step."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def dataset(count: int = 64) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(VOCABULARY, (count, 16), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def trainer(model: PeftModel, output: Path, *, eval_rows: int = 0, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "weight_decay": 0.01,
        "max_grad_norm": 0.1,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
    }
    made = Trainer(
        model=model,
        args=TrainingArguments(**settings | changes),
        train_dataset=dataset(),
        eval_dataset=dataset(eval_rows) if eval_rows else None,
    )
    made.remove_callback(PrinterCallback)
    return made


def history(made: Trainer) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) of every step."""
    return [
        (entry["loss"], float(entry["grad_norm"]), entry["learning_rate"])
        for entry in made.state.log_history
        if "grad_norm" in entry
    ]


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=tokens).logits


@contextlib.contextmanager
def no_tickets_left(server: Any) -> Any:
    """Fails where the block leaves saved state on the server."""
    before = server.metric("kt_expert_tickets")
    yield
    wait_until(lambda: server.metric("kt_expert_tickets") <= before)
