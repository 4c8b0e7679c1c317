"""One experts call as a differentiable function: forward and backward run on the server."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from kt_expert_client.adapter import ActiveAdapter
from kt_expert_client.errors import UnsupportedModel

# The gradients of hidden states [T, H] and of routing weights [T, k], and those of the parameters that were asked for.
Answer = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]
_FIRST_PARAMETER = 2  # among the tensors a call is given: after hidden states and routing weights


@dataclass(frozen=True, eq=False, slots=True)
class ExpertsCall:
    """What a forward is told beside its differentiable inputs. `keep` says whether a backward may come; it must be computed
    outside: inside, gradient mode looks the same under no_grad and in the discarded first pass of reentrant checkpointing, and
    a ticket kept there would never be used. Dropout seed 0 drops nothing. `meanwhile` is done while the server computes."""

    expert_ids: torch.Tensor  # [T, k]
    adapters: tuple[ActiveAdapter, ...]
    keep: bool
    dropout_seed: int
    meanwhile: Callable[[], None] | None = None


class ForwardResult(Protocol):
    """A forward that was sent."""

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [T, H] and the ticket, int64 [1], that frees what the server keeps once it is gone (0: nothing is kept).
        Once, and raises the request's error."""

    def abandon(self) -> None:
        """Nobody will wait. Does nothing where somebody has; never waits and never fails."""


class BackwardResult(Protocol):
    """A backward that was sent."""

    def wait(self) -> Answer:
        """The gradients of hidden states [T, H] and routing weights [T, k], and those of the parameters. Raises the request's
        error."""


class RemoteLayer(Protocol):
    """What the functions need of a layer that lives elsewhere."""

    layer: int

    def submit(
        self, hidden_states: torch.Tensor, routing_weights: torch.Tensor, call: ExpertsCall, *, borrow: bool
    ) -> ForwardResult:
        """`borrow`: the tensors stay as they are until the result is there."""

    def submit_backward(self, ticket: int, grad_output: torch.Tensor, parameters: Sequence[torch.Tensor]) -> BackwardResult:
        """The ticket may be used again; grad_output stays as it is."""


class ExpertsOperator:
    """torch.ops.kt_expert.experts.default, by which torch's dispatcher sees a call: selective checkpointing can be told to keep
    its results, and does not ask the server again. (hidden_states [T, H], routing_weights [T, k], a call's number) -> output
    [T, H] and the ticket, int64 [1]."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[RemoteLayer, ExpertsCall]] = {}  # those that are being made
        self._numbers = itertools.count(1)
        self._library = torch.library.Library("kt_expert", "DEF")
        self._library.define("experts(Tensor hidden_states, Tensor routing_weights, int call) -> (Tensor, Tensor)")
        self._library.impl("experts", self._compute, "CompositeExplicitAutograd")

    def __call__(
        self, hidden_states: torch.Tensor, routing_weights: torch.Tensor, layer: RemoteLayer, call: ExpertsCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        number = next(self._numbers)
        self._calls[number] = (layer, call)
        try:
            output, ticket = torch.ops.kt_expert.experts(hidden_states, routing_weights, number)
        finally:
            self._calls.pop(number)
        return output, ticket

    def _compute(
        self, hidden_states: torch.Tensor, routing_weights: torch.Tensor, number: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer, call = self._calls[number]
        return layer.submit(hidden_states, routing_weights, call, borrow=True).wait()


_EXPERTS = ExpertsOperator()


class ExpertsFunction(torch.autograd.Function):
    """hidden_states [T, H], routing_weights [T, k], a call, and the remote parameters it depends on -> [T, H].

    The ticket travels as a saved CPU tensor, so it lives as long as its graph, and saved-tensor hooks see it: non-reentrant
    checkpointing drops it after the first pass (the finalizer frees the server's state) and asks for it again before backward,
    which runs the forward anew under a new ticket.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        routing_weights: torch.Tensor,
        layer: RemoteLayer,
        call: ExpertsCall,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        output, ticket = _EXPERTS(hidden_states, routing_weights, layer, call)
        ctx.layer, ctx.parameters = layer, parameters
        ctx.weights_dtype = routing_weights.dtype
        if call.keep:
            ctx.save_for_backward(ticket)
        return output

    @staticmethod
    @once_differentiable  # a second derivative would silently be zero
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (handle,) = ctx.saved_tensors
        return gradients_of(ctx, submit_backward(ctx, ctx.layer, handle, grad_outputs[0]).wait())


def submit_backward(node: Any, layer: RemoteLayer, ticket: torch.Tensor, grad_output: torch.Tensor) -> BackwardResult:
    """For the parameters of a call's node that this pass of autograd collects."""
    parameters = [each for index, each in enumerate(node.parameters) if _is_collected(node, index)]
    return layer.submit_backward(int(ticket.item()), grad_output, parameters)


def gradients_of(ctx: Any, answer: Answer) -> tuple[torch.Tensor | None, ...]:
    """What a call's node returns from its backward."""
    grad_hidden, grad_weights, gradients = answer
    remaining = iter(gradients)
    return (
        grad_hidden if ctx.needs_input_grad[0] else None,
        grad_weights.to(ctx.weights_dtype) if ctx.needs_input_grad[1] else None,
        None,
        None,
        *(next(remaining) if _is_collected(ctx, index) else None for index in range(len(ctx.parameters))),
    )


def _is_collected(ctx: Any, index: int) -> bool:
    """Whether this pass of autograd adds to the parameter's gradient."""
    node = ctx.next_functions[_FIRST_PARAMETER + index][0]
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError as error:
        raise UnsupportedModel(
            "autograd.grad was asked for the gradient of a remote parameter; call backward(), which collects it in .grad"
        ) from error
