"""What a user's script looks like: stock transformers, PEFT and Trainer.

The one line that is ours is the first import. Without KT_EXPERT_SERVER it does nothing and the experts are local; with
it the experts, their LoRA and their optimizer are on the server. Everything else is the same script.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import kt_expert_client  # noqa: F401
import torch
from corpus import Windows, splits
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.utils import logging

SEED = 7
WINDOW = 128
WINDOWS = 32  # few, so that several epochs pass and the loss shows it
PROBE_WINDOWS = 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(SEED)

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(model, lora)
    _, held_out = splits()
    dataset = Windows(held_out, WINDOW, WINDOWS)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(options.out / "trainer"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=options.steps,
            learning_rate=5e-3,
            warmup_steps=3,
            lr_scheduler_type="linear",
            max_grad_norm=0.25,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            seed=SEED,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
    )
    trainer.remove_callback(PrinterCallback)  # the table at the end of the demo has the same numbers side by side
    trainer.train()
    model.save_pretrained(options.out / "adapter")

    model.eval()
    probe = torch.stack([dataset[index]["input_ids"] for index in range(PROBE_WINDOWS)])
    with torch.no_grad():
        logits = model(input_ids=probe).logits
    save_file({"input_ids": probe, "logits": logits.contiguous()}, options.out / "probe.safetensors")
    history = [
        {"step": entry["step"], "loss": entry["loss"], "grad_norm": float(entry["grad_norm"])}
        for entry in trainer.state.log_history
        if "grad_norm" in entry
    ]
    experts = sum(
        each.numel() for name, each in model.named_parameters() if ".experts." in name and each.untyped_storage().nbytes()
    )
    result = {"history": history, "expert_parameters": experts}
    (options.out / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
