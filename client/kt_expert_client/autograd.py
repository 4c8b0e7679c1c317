"""One experts call as a differentiable function: forward and backward run on the server."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable


class RemoteLayer(Protocol):
    """What the function needs of a layer that lives elsewhere. Calls wait for the server's answer."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        keep: bool,
        use_adapter: bool,
        dropout_seed: int,
    ) -> tuple[torch.Tensor, int]:
        """Returns the output [T, H] and the ticket (0 where `keep` is false). Seed 0 drops nothing."""

    def backward(self, ticket: int, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the gradients of hidden states [T, H] and routing weights [T, k]."""

    def release(self, ticket: int) -> None:
        """Forgets a ticket if no backward has consumed it."""


class ExpertsFunction(torch.autograd.Function):
    """hidden_states [T, H], routing_weights [T, k], anchor [1] or None, expert_ids [T, k] -> [T, H].

    `keep` must be computed by the caller: inside, gradient mode looks the same under no_grad and in the discarded first
    pass of reentrant checkpointing, and a ticket kept there would never be consumed. The ticket travels as a saved CPU
    tensor, so saved-tensor hooks see it: non-reentrant checkpointing drops it after the first pass (the finalizer frees
    the server's state) and asks for it again before backward, which runs the forward anew under a new ticket.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        routing_weights: torch.Tensor,
        anchor: torch.Tensor | None,
        expert_ids: torch.Tensor,
        layer: RemoteLayer,
        keep: bool,
        use_adapter: bool,
        dropout_seed: int,
    ) -> torch.Tensor:
        output, ticket = layer.forward(
            hidden_states, expert_ids, routing_weights, keep=keep, use_adapter=use_adapter, dropout_seed=dropout_seed
        )
        ctx.layer = layer
        ctx.anchor_like = None if anchor is None else (anchor.shape, anchor.dtype, anchor.device)
        ctx.weights_dtype = routing_weights.dtype
        if keep:
            handle = torch.tensor([ticket], dtype=torch.int64)
            weakref.finalize(handle, layer.release, ticket).atexit = False
            ctx.save_for_backward(handle)
        return output

    @staticmethod
    @once_differentiable  # a second derivative would silently be zero
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (handle,) = ctx.saved_tensors
        grad_hidden, grad_weights = ctx.layer.backward(int(handle.item()), grad_outputs[0])
        grad_anchor = None
        if ctx.anchor_like is not None and ctx.needs_input_grad[2]:
            shape, dtype, device = ctx.anchor_like
            grad_anchor = torch.zeros(shape, dtype=dtype, device=device)
        return (
            grad_hidden if ctx.needs_input_grad[0] else None,
            grad_weights.to(ctx.weights_dtype) if ctx.needs_input_grad[1] else None,
            grad_anchor,
            None,
            None,
            None,
            None,
            None,
        )
