"""Batches for the tiny qwen3_moe, and one step of training with them through the client."""

from __future__ import annotations

from typing import Any

import torch
from kt_expert_client import Client, LayerLora, Run

HIDDEN, TOP_K, EXPERTS, LAYERS = 32, 2, 8, 3
LORA = [LayerLora(layer, True, 4, 4, 4, 2.0, 2.0, 2.0) for layer in range(LAYERS)]


def batch(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices
    x = torch.randn(tokens, HIDDEN, generator=generator)
    return x, ids, torch.rand(tokens, TOP_K, generator=generator)


def opened(client: Client, **options: Any) -> Run:
    """A run with LoRA on every layer, always the same."""
    return client.open_run(lora=LORA, wire_dtype="fp32", seed=3, **options)


def one_pass(run: Run, seed: int, tokens: int) -> list[torch.Tensor]:
    """Of layer 0: output, and gradients of hidden states and routing weights."""
    x, ids, weights = batch(tokens, seed)
    forward = run.submit_forward(0, x, ids, weights)
    output = forward.result()
    back = run.submit_backward(0, forward.ticket, torch.sin(x), replace_gradients=True)
    return [output, *back.result()]


def train_step(run: Run, seed: int, *, tokens: int = 12, scale: float = 1.0) -> torch.Tensor:
    """One forward and backward through every layer; returns the last output."""
    x, ids, weights = batch(tokens, seed)
    for layer in range(LAYERS):
        handle = run.submit_forward(layer, x, ids, weights)
        output = handle.result()
        run.submit_backward(layer, handle.ticket, torch.cos(output) * scale).result()
        x = x + output
    return x
