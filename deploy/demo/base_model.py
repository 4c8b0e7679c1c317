"""Trains the demo's base model: a small byte-level Qwen3-MoE, from scratch, saved as a user's checkpoint would be."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from corpus import VOCABULARY, splits
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.utils import logging

SEED = 20
WINDOW = 128
BATCH = 16
LEARNING_RATE = 3e-3
REPORT_EVERY = 25


def config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=96,
        num_experts=16,
        num_experts_per_tok=4,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def train(steps: int) -> torch.nn.Module:
    """Returns the trained model in fp32."""
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32)
    data, _ = splits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(SEED)
    begun = time.monotonic()
    for step in range(1, steps + 1):
        starts = torch.randint(len(data) - WINDOW, (BATCH,), generator=generator)
        batch = torch.stack([data[start : start + WINDOW] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % REPORT_EVERY == 0 or step == steps:
            print(
                f"  base model: step {step}/{steps}, loss {loss.item():.3f}, {time.monotonic() - begun:.0f} s",
                flush=True,
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    logging.disable_progress_bar()
    model = train(options.steps)
    # bf16 on disk, so that a trainer in fp32 and the server hold the same numbers.
    model.to(torch.bfloat16).save_pretrained(options.out)


if __name__ == "__main__":
    main()
