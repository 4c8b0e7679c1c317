"""One call of offloaded experts that is on its way: its outcome, and the backwards that were sent for it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from kt_expert_client.autograd import Answer, BackwardResult, ExpertsCall, ForwardResult, RemoteLayer, submit_backward
from kt_expert_client.errors import KtExpertError, WrongPhase, copy_of

Hooks = tuple[Callable[..., Any], Callable[..., Any]] | None


class Awaited:
    """One call: its outcome, which is waited for once, and the backwards that were sent for it."""

    def __init__(self, layer: RemoteLayer, call: ExpertsCall, result: ForwardResult, inputs: Iterable[torch.Tensor]) -> None:
        self.layer, self.call = layer, call
        self.hooks = _saved_tensors_hooks()
        # For a gradient that does not come through AwaitExperts: until the graph is gone, or for the pass that runs now.
        self._kept_ticket: torch.Tensor | None = None
        self._offered_ticket: torch.Tensor | None = None
        self._token: torch.Tensor | None = None  # the gradient of one that does
        self._result: ForwardResult | None = result
        self._versions = [(each, each._version) for each in inputs if not each.is_inference()]
        self._error: KtExpertError | None = None
        # By autograd pass, with their tickets: those are not to be released before the answers are here.
        self._sent: dict[int, list[tuple[BackwardResult, torch.Tensor]]] = {}
        weakref.finalize(self, result.abandon).atexit = False

    def finish(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output [T, H] and the ticket, int64 [1], once. Raises the request's error, each time."""
        if self._error is not None:
            raise copy_of(self._error)
        assert self._result is not None  # noqa: S101  # the pending tensor keeps the outcome
        result, self._result = self._result, None
        versions, self._versions = self._versions, []
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                output, ticket = result.wait()
            if any(tensor._version != version for tensor, version in versions):
                raise WrongPhase(
                    "the experts' input was changed in place before their output was used; the request may have been sent "
                    "with either values. Change a copy, or use the output first"
                )
        except KtExpertError as error:
            self._error = error
            raise
        return output, ticket

    def keep(self, ticket: torch.Tensor | None) -> None:
        """Somebody may be computing with the values where autograd does not see it."""
        self._kept_ticket = ticket if self._kept_ticket is None else self._kept_ticket

    def offer(self, ticket: torch.Tensor | None) -> None:
        """In this pass a gradient comes that does not come through AwaitExperts."""
        self._offered_ticket = ticket

    def token(self, grad_output: torch.Tensor) -> torch.Tensor:
        """What AwaitExperts gives SubmitExperts: zeros without memory, which say that the gradient has come."""
        self._token = grad_output.new_zeros(()).expand(grad_output.shape)
        return self._token

    def is_token(self, gradient: torch.Tensor) -> bool:
        """Whether all of a gradient has come through AwaitExperts."""
        token = self._token
        return token is not None and (gradient.data_ptr(), gradient.stride()) == (token.data_ptr(), token.stride())

    def send_direct(self, node: Any, grad_output: torch.Tensor) -> None:
        """A backward for a gradient that has not come through AwaitExperts. Raises WrongPhase where saved-tensor hooks have the
        ticket by now."""
        ticket, self._offered_ticket = self._offered_ticket, None
        ticket = self._kept_ticket if ticket is None else ticket
        if ticket is None:
            raise WrongPhase(
                f"the output of the experts of layer {self.layer.layer} was used, and then computed with where autograd does "
                "not see it, under checkpointing or other saved-tensor hooks; compute with output * 1"
            )
        self.send(node, ticket, grad_output)

    def send(self, node: Any, ticket: torch.Tensor, grad_output: torch.Tensor) -> None:
        """A backward, for the pass that runs now. `node` is SubmitExperts'."""
        sent = submit_backward(node, self.layer, ticket, grad_output)
        self._sent.setdefault(torch._C._current_graph_task_id(), []).append((sent, ticket))

    def answers(self) -> list[Answer]:
        """Of the backwards that were sent in this pass."""
        sent = self._sent.pop(torch._C._current_graph_task_id(), [])
        self._sent.clear()  # of passes that ended with an error
        return [each.wait() for each, _ in sent]


def sum_of(answers: list[Answer]) -> Answer:
    """Of several backwards of one pass."""
    hidden, weights, gradients = answers[0]
    for more_hidden, more_weights, more in answers[1:]:
        hidden, weights = hidden + more_hidden, weights + more_weights
        gradients = [left + right for left, right in zip(gradients, more, strict=True)]
    return hidden, weights, gradients


def hooks_of(state: Awaited) -> contextlib.AbstractContextManager[object]:
    """Under other hooks than the call's, a ticket is saved as it is: they would find another number of tensors next time."""
    if _saved_tensors_hooks() == state.hooks:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _saved_tensors_hooks() -> Hooks:
    hooks: Hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
