"""Float64 reference of one MoE layer with LoRA, differentiated by torch autograd.

Written from the formulas alone and independent of the engine: plain loops over experts, dense matrices, no blocking.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from golden.philox import keep

LORA_TENSORS = ("a_gate", "b_gate", "a_up", "b_up", "a_down", "b_down")


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: E experts, H hidden, I intermediate, T tokens, k routes per token."""

    experts: int
    hidden: int
    intermediate: int
    tokens: int
    top_k: int
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class Lora:
    """Ranks and scales; rank 0 leaves a projection alone."""

    tied: bool = False
    rank_gate: int = 0
    rank_up: int = 0
    rank_down: int = 0
    scale_gate: float = 0.0
    scale_up: float = 0.0
    scale_down: float = 0.0
    dropout: float = 0.0


NO_LORA = Lora()


@dataclass
class Case:
    """Inputs of one forward and backward, as float64 tensors that hold bf16-representable weights and tokens."""

    shape: Shape
    lora: Lora
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    adapter: dict[str, Tensor]
    x: Tensor
    ids: Tensor
    routing_weights: Tensor
    dy: Tensor
    dropout_seed: int = 0  # 0: nothing is dropped
    dropout_layer: int = 0


@dataclass
class Golden:
    y: Tensor
    dx: Tensor
    d_weights: Tensor
    adapter: dict[str, Tensor] = field(default_factory=dict)


def as_bf16(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(torch.float64)


def bf16_bits(values: Tensor) -> np.ndarray:
    return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).to(torch.float64)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Relative L2; the absolute norm where nothing is expected."""
    difference = torch.linalg.vector_norm(got.double() - expected.double()).item()
    norm = torch.linalg.vector_norm(expected.double()).item()
    return difference / norm if norm > 0 else difference


def lora_shapes(shape: Shape, lora: Lora) -> dict[str, tuple[int, int, int]]:
    e, h, i = shape.experts, shape.hidden, shape.intermediate
    shapes = {
        "a_gate": (e, lora.rank_gate, h),
        "b_gate": (e, i, lora.rank_gate),
        "a_up": (e, 0 if lora.tied else lora.rank_up, h),
        "b_up": (e, i, lora.rank_up),
        "a_down": (e, lora.rank_down, i),
        "b_down": (e, h, lora.rank_down),
    }
    return {name: size for name, size in shapes.items() if 0 not in size}


def make_case(shape: Shape, lora: Lora = NO_LORA, *, seed: int = 0, used_experts: int | None = None) -> Case:
    """Random inputs; routes go to the first `used_experts` experts only, so the rest stay empty."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64) * std

    e, h, i = shape.experts, shape.hidden, shape.intermediate
    weights = {
        "gate": as_bf16(normal(e, i, h, std=h**-0.5)),
        "up": as_bf16(normal(e, i, h, std=h**-0.5)),
        "down": as_bf16(normal(e, h, i, std=i**-0.5)),
    }
    biases = {}
    if shape.bias:
        biases = {name: normal(e, size, std=0.3).float().double() for name, size in (("gate", i), ("up", i), ("down", h))}
    adapter = {name: as_bf16(normal(*size, std=size[2] ** -0.5)) for name, size in lora_shapes(shape, lora).items()}
    experts = used_experts or e
    scores = torch.rand(shape.tokens, experts, generator=generator)
    ids = scores.topk(shape.top_k, dim=-1).indices
    return Case(
        shape,
        lora,
        weights,
        biases,
        adapter,
        as_bf16(normal(shape.tokens, h, std=1.0)),
        ids,
        torch.rand(shape.tokens, shape.top_k, generator=generator).double().float().double(),
        as_bf16(normal(shape.tokens, h, std=1.0)),
    )


def _activate(shape: Shape, gate: Tensor, up: Tensor) -> Tensor:
    if shape.activation == "silu":
        return torch.nn.functional.silu(gate) * up
    gate = gate.clamp(max=shape.limit)
    up = up.clamp(min=-shape.limit, max=shape.limit)
    return (up + 1) * gate * torch.sigmoid(shape.alpha * gate)


def forward(case: Case, x: Tensor, routing_weights: Tensor, adapter: dict[str, Tensor]) -> Tensor:
    """y [T, H] in float64. An id equal to E is skipped."""
    lora = case.lora
    y = torch.zeros_like(x)

    def factors(token: Tensor, site: int, width: int) -> Tensor | float:
        if not case.dropout_seed or not lora.dropout:
            return 1.0
        rows = [keep(case.dropout_seed, case.dropout_layer, int(t), site, width, lora.dropout) for t in token]
        return torch.stack(rows)

    def project(name: str, expert: int, rows: Tensor, rank: int, scale: float, kept: Tensor | float) -> Tensor:
        out = rows @ case.weights[name][expert].T
        if case.biases:
            out = out + case.biases[name][expert]
        if rank:
            a = adapter["a_gate" if name == "up" and lora.tied else f"a_{name}"][expert]
            out = out + scale * (rows * kept @ a.T) @ adapter[f"b_{name}"][expert].T
        return out

    for expert in range(case.shape.experts):
        token, slot = torch.where(case.ids == expert)
        if not len(token):
            continue
        rows = x[token]
        kept_x = factors(token, 0, case.shape.hidden)
        kept_h = factors(token, expert + 1, case.shape.intermediate)
        gate = project("gate", expert, rows, lora.rank_gate, lora.scale_gate, kept_x)
        up = project("up", expert, rows, lora.rank_up, lora.scale_up, kept_x)
        out = project("down", expert, _activate(case.shape, gate, up), lora.rank_down, lora.scale_down, kept_h)
        y = y.index_add(0, token, out * routing_weights[token, slot, None])
    return y


def golden(case: Case) -> Golden:
    """Forward and every gradient of <y, dy>, by autograd in float64."""
    x = case.x.clone().requires_grad_()
    routing_weights = case.routing_weights.clone().requires_grad_()
    adapter = {name: value.clone().requires_grad_() for name, value in case.adapter.items()}
    y = forward(case, x, routing_weights, adapter)
    inputs = [x, routing_weights, *adapter.values()]
    grads = torch.autograd.grad(y, inputs, case.dy, allow_unused=True) if y.requires_grad else [None] * len(inputs)
    filled = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]
    return Golden(y.detach(), filled[0], filled[1], dict(zip(adapter, filled[2:], strict=True)))
