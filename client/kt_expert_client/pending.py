"""The experts' output as a tensor that waits for the server at its first use: what does not need it runs meanwhile.

A call makes two nodes of autograd. `SubmitExperts` is made where the experts are called, and sends the request;
`AwaitExperts` where the output is used for the first time, and waits. Autograd runs the youngest node that is ready: so in
backward `AwaitExperts` sends the gradient, whatever was computed between the two (shared experts, say) runs next, and
`SubmitExperts` waits for the answer.

The tensor in between has no memory. Views and casts of it wait as well. Any other operation that torch knows gets the awaited
tensor (`__torch_function__`, which is above autograd); code that passes it to autograd from elsewhere, such as a Function of
its own, meets its values below (`__torch_dispatch__`), and the gradient then comes to `SubmitExperts` itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map_only

from kt_expert_client.autograd import ExpertsCall, RemoteLayer, gradients_of
from kt_expert_client.awaited import Awaited, hooks_of, sum_of

aten = torch.ops.aten
_plain = torch._C.DisableTorchFunctionSubclass


def can_wait_later() -> bool:
    """Whether nothing is at work here that wants to see the values of each operation, or to make each operation again."""
    return _get_current_dispatch_mode() is None and not torch._C._are_functorch_transforms_active()


class SubmitExperts(torch.autograd.Function):
    """hidden_states [T, H], routing_weights [T, k], a call, and the remote parameters it depends on -> the pending output."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        routing_weights: torch.Tensor,
        layer: RemoteLayer,
        call: ExpertsCall,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.state = _begin(hidden_states, routing_weights, layer, call)
        ctx.parameters, ctx.weights_dtype = parameters, routing_weights.dtype
        return _pending(Root(ctx.state), hidden_states)

    @staticmethod
    @once_differentiable  # a second derivative would silently be zero
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        state: Awaited = ctx.state
        answers = state.answers()
        if not state.is_token(grad_outputs[0]):
            state.send_direct(ctx, grad_outputs[0])
            answers += state.answers()
        return gradients_of(ctx, sum_of(answers))


class _Use(torch.autograd.Function):
    """A pending tensor, and the values that it stands for -> these. The ticket is saved as ExpertsFunction saves it."""

    @staticmethod
    def forward(
        ctx: Any, pending: torch.Tensor, state: Awaited, values: list[torch.Tensor], ticket: torch.Tensor | None
    ) -> torch.Tensor:
        """`values` are in a list: what is made of a tensor that autograd sees could not be changed in place."""
        del pending
        ctx.state = state
        ctx.save_for_backward(ticket)
        return values[0]


class AwaitExperts(_Use):
    """The use of a call's own output: its backward sends the gradient."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ticket,) = ctx.saved_tensors  # first: this may make the forward again
        grad_output = grad_outputs[0]
        ctx.state.send(ctx.next_functions[0][0], ticket, grad_output)
        return ctx.state.token(grad_output), None, None, None


class Materialise(_Use):
    """The use of a pending tensor that came out of somebody else's Function (a module's backward hook is one). The gradient
    goes to SubmitExperts through that Function, and the ticket with it."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (ticket,) = ctx.saved_tensors
        ctx.state.offer(ticket)
        return grad_outputs[0], None, None, None


@dataclass(frozen=True, eq=False, slots=True)
class Root:
    """A call's own output."""

    state: Awaited

    def values(self, pending: PendingTensor, *, unseen: bool) -> torch.Tensor:
        """Without gradients. `unseen`: who computes with them has a gradient that does not come through AwaitExperts."""
        if unseen and self.state.call.keep:
            self.state.keep(pending.ticket())
        return pending.outcome()[0] if pending.value is None else pending.value.detach()

    def awaited(self, pending: PendingTensor) -> torch.Tensor:
        """Above autograd, connected with what the pending tensor was computed from."""
        output, ticket = pending.outcome()
        if not pending.requires_grad:
            return output
        applied: torch.Tensor
        with hooks_of(self.state):
            applied = AwaitExperts.apply(pending, self.state, [output], ticket)  # type: ignore[no-untyped-call]
        return applied

    def root(self, pending: PendingTensor) -> tuple[PendingTensor, Awaited]:
        return pending, self.state


@dataclass(frozen=True, eq=False, slots=True)
class Derived:
    """What a view or a cast makes of a pending tensor."""

    parent: PendingTensor
    operation: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def values(self, pending: PendingTensor, *, unseen: bool) -> torch.Tensor:
        del pending
        return self.operation(self.parent.origin.values(self.parent, unseen=unseen), *self.args, **self.kwargs)

    def awaited(self, pending: PendingTensor) -> torch.Tensor:
        del pending
        return self.operation(awaited(self.parent), *self.args, **self.kwargs)

    def root(self, pending: PendingTensor) -> tuple[PendingTensor, Awaited]:
        del pending
        return self.parent.origin.root(self.parent)


class PendingTensor(torch.Tensor):
    """Shape, dtype and device are known; the rest is where `origin` says."""

    origin: Root | Derived
    value: torch.Tensor | None  # once it was used
    _outcome: tuple[torch.Tensor, torch.Tensor] | None  # of a call, until then
    _await: Any  # the node of autograd that its first use made
    _lock: threading.RLock

    @staticmethod
    def __new__(
        cls: type[PendingTensor], origin: Root | Derived, like: torch.Tensor, dtype: torch.dtype, device: torch.device
    ) -> PendingTensor:
        made: PendingTensor = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), storage_offset=like.storage_offset(), dtype=dtype, device=device
        )
        made.origin, made.value, made._outcome, made._await, made._lock = origin, None, None, None, threading.RLock()
        return made

    def outcome(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the call whose output it is, until it is used. Raises the call's error."""
        with self._lock:
            if self._outcome is None:
                assert isinstance(self.origin, Root)  # noqa: S101  # only a root asks
                self._outcome = self.origin.state.finish()
            return self._outcome

    def ticket(self) -> torch.Tensor | None:
        """Of the call whose output it is. None where saved-tensor hooks have it by now."""
        assert isinstance(self.origin, Root)  # noqa: S101  # only a root is asked
        if self._await is None:
            return self.outcome()[1]
        found: torch.Tensor | None = None if self.origin.state.hooks is not None else self._await.saved_tensors[0]
        return found

    def use(self) -> torch.Tensor:
        """What it stands for, from now on."""
        with self._lock:
            root, state = self.origin.root(self)
            if self.requires_grad and not torch.is_grad_enabled() and self.value is None:
                # A look without gradients, or the inside of a Function, whose gradient will not come through AwaitExperts.
                state.keep(root.ticket())
            if self.value is None:
                inference = torch.is_inference_mode_enabled() and not self.requires_grad
                with torch.inference_mode(mode=inference), torch.set_grad_enabled(self.requires_grad):
                    self.value = self._materialised() if self._is_somebody_elses() else self.origin.awaited(self)
                self._await, self._outcome = self.value.grad_fn, None
            return self.value

    def _is_somebody_elses(self) -> bool:
        """Whether a Function that is not SubmitExperts made it: its gradient has to go through that."""
        node: Any = self.grad_fn
        root, state = self.origin.root(self)
        is_own = root is self and getattr(node, "state", None) is state
        return isinstance(node, BackwardCFunction) and not is_own

    def _materialised(self) -> torch.Tensor:
        root, state = self.origin.root(self)
        applied: torch.Tensor
        with hooks_of(state):
            values = self.origin.values(self, unseen=False)
            applied = Materialise.apply(self, state, [values], root.ticket())  # type: ignore[no-untyped-call]
        return applied

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        del types
        # Autograd makes a view of what a Function returns of its inputs.
        if func is torch.Tensor.view_as and isinstance(args[0], PendingTensor):
            func, args = torch.Tensor.view, (args[0], args[1].shape)
        if func in _METADATA or (func in _DERIVING and not _has_pending(args[1:], kwargs)):
            with _plain():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(PendingTensor, awaited, (args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's annotations lack the classmethod
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[Any, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in _DERIVED and isinstance(args[0], PendingTensor):
            return _derive(func, args[0], args[1:], kwargs)
        args, kwargs = tree_map_only(PendingTensor, _values, (args, kwargs))
        return func(*args, **kwargs)


def _values(pending: PendingTensor) -> torch.Tensor:
    with _plain():
        return pending.origin.values(pending, unseen=True)


def awaited(pending: PendingTensor) -> torch.Tensor:
    """The tensor that it stands for; waits for it the first time."""
    with _plain():
        return pending.use()


def ready(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or what it stands for."""
    return awaited(tensor) if isinstance(tensor, PendingTensor) else tensor


def experts_output(
    hidden_states: torch.Tensor,
    routing_weights: torch.Tensor,
    layer: RemoteLayer,
    call: ExpertsCall,
    parameters: Iterable[torch.Tensor],
) -> torch.Tensor:
    """The pending output [T, H] of a call that has been sent. Errors of the call come at its first use."""
    hidden_states, routing_weights = ready(hidden_states), ready(routing_weights)
    if call.keep:
        made: torch.Tensor = SubmitExperts.apply(hidden_states, routing_weights, layer, call, *parameters)  # type: ignore[no-untyped-call]
        return made
    return _pending(Root(_begin(hidden_states, routing_weights, layer, call)), hidden_states)


def _begin(hidden_states: torch.Tensor, routing_weights: torch.Tensor, layer: RemoteLayer, call: ExpertsCall) -> Awaited:
    result = layer.submit(hidden_states, routing_weights, call, borrow=call.keep and not hidden_states.is_cuda)
    return Awaited(layer, call, result, (hidden_states, routing_weights) if call.keep else ())


def _pending(origin: Root | Derived, like: torch.Tensor) -> PendingTensor:
    with _plain():
        geometry = torch.empty(like.shape, dtype=like.dtype, device="meta")
        return PendingTensor(origin, geometry, like.dtype, like.device)


def _derive(func: Any, parent: PendingTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PendingTensor:
    known = torch.empty_strided(parent.shape, parent.stride(), dtype=parent.dtype, device="meta")
    on_meta = {name: value for name, value in kwargs.items() if name != "device"}
    geometry = func(known, *args, **on_meta)
    device = kwargs.get("device") or parent.device
    return PendingTensor(Derived(parent, func, args, kwargs), geometry, geometry.dtype, torch.device(device))


def _has_pending(args: tuple[Any, ...], kwargs: dict[Any, Any] | None) -> bool:
    return any(isinstance(each, PendingTensor) for each in (*args, *(kwargs or {}).values()))


_METADATA = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad", "grad_fn", "is_leaf")
    ),
    *(
        getattr(torch.Tensor, name)
        for name in (
            "size",
            "dim",
            "numel",
            "nelement",
            "stride",
            "is_floating_point",
            "is_contiguous",
            "__len__",
            "get_device",
        )
    ),
}
_DERIVING = {
    getattr(torch.Tensor, name)
    for name in ("view", "reshape", "flatten", "unsqueeze", "squeeze", "to", "float", "half", "bfloat16", "detach")
} | {torch.reshape, torch.flatten, torch.unsqueeze, torch.squeeze, torch.Tensor.contiguous}
_DERIVED = {
    aten.view.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten._to_copy.default,
    aten.detach.default,
    aten.alias.default,
}
