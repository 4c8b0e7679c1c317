"""Small layers of experts as checkpoints hold them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

E, H, I = 3, 10, 6  # noqa: E741  # the letters of the formulas
PREFIX = "model.layers.0."


def expert_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    return {"gate": normal(E, I, H), "up": normal(E, I, H), "down": normal(E, H, I)}


def per_expert(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A tensor an expert and projection, as most checkpoints hold them."""
    return {
        f"{PREFIX}mlp.experts.{e}.{name}_proj.weight": values[e].to(dtype) for name, values in weights.items() for e in range(E)
    }


def write(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    directory.mkdir(exist_ok=True)
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, directory / "model.safetensors")
    base = {"hidden_size": H, "num_hidden_layers": 1, "num_experts_per_tok": 2}
    (directory / "config.json").write_text(json.dumps(base | config))
    return directory
