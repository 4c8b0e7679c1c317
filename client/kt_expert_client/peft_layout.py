"""LoRA tensors between PEFT's layout of a targeted 3-D parameter and the server's.

PEFT (tuners/lora/layer.py, ParamWrapper) keeps, for E experts and rank r, lora_A as [r * E, in] with row e * r + j, and
lora_B as [out, r * E] with column j * E + e. gate and up share one A; their outputs are concatenated, or interleaved
where the model interleaves them. What comes from PEFT is a view: its values are put in order as they are sent, some experts
at a time.
"""

from __future__ import annotations

import torch


def a_from_peft(weight: torch.Tensor, experts: int) -> torch.Tensor:
    """[r * E, in] -> [E, r, in]."""
    return weight.reshape(experts, -1, weight.shape[-1])


def a_to_peft(tensor: torch.Tensor) -> torch.Tensor:
    """[E, r, in] -> [r * E, in]."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def b_from_peft(weight: torch.Tensor, experts: int) -> torch.Tensor:
    """[out, r * E] -> [E, out, r]."""
    return weight.reshape(weight.shape[0], -1, experts).permute(2, 0, 1)


def b_to_peft(tensor: torch.Tensor) -> torch.Tensor:
    """[E, out, r] -> [out, r * E]."""
    return tensor.permute(1, 2, 0).reshape(tensor.shape[1], -1).contiguous()


def split_gate_up(tensor: torch.Tensor, *, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """[E, 2I, r] -> gate and up [E, I, r]."""
    if interleaved:
        return tensor[:, 0::2], tensor[:, 1::2]
    gate, up = tensor.chunk(2, dim=1)
    return gate, up


def join_gate_up(gate: torch.Tensor, up: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """gate and up [E, I, r] -> [E, 2I, r]."""
    if interleaved:
        return torch.stack((gate, up), dim=2).flatten(1, 2)
    return torch.cat((gate, up), dim=1)
