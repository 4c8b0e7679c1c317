"""One model whose experts are elsewhere: its run on the server, its layers, and its gradient window."""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kt_expert_client.adapter import AdapterTensors, LayerLora
from kt_expert_client.connection import Client
from kt_expert_client.errors import UnsupportedModel, WrongPhase
from kt_expert_client.membership import ALONE, current_membership
from kt_expert_client.optimizers import has_stepped, translate
from kt_expert_client.options import RunOptions
from kt_expert_client.run import Run

# Fills anchor.grad where there is no norm to report. Not 0: zero_grad(set_to_none=False) must be told apart, in fp16 too.
TINY_NORM = 1e-7
_NO_PASS = -1


@dataclass(frozen=True, slots=True)
class LocalLayerSpec:
    """A layer as the trainer's own config describes it, for the handshake."""

    layer: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str
    alpha: float
    limit: float
    has_bias: bool


class Anchor(nn.Module):
    """A one-element parameter that stands for all LoRA parameters on the server.

    Every experts call takes it as an input, so the loss always needs a gradient, an optimizer always has a parameter, and
    ``clip_grad_norm_`` sees, in its gradient, the norm of the gradients it stands for.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=device))


@dataclass(slots=True)
class _Ticket:
    """A forward's saved state on the server, and the run that has it: the model may have another one by now."""

    run: Run
    number: int
    is_consumed: bool = False


class OffloadedLayer:
    """Implements RemoteLayer for one layer of an offloaded model. Its tickets are numbers of its own: those of two runs may
    be the same."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedLayer:
        """A copied model talks to the same server through the same run."""
        memo[id(self)] = self
        return self

    def __init__(self, offload: ModelOffload, layer: int) -> None:
        self._offload = offload
        self.layer = layer
        self._tickets: dict[int, _Ticket] = {}  # until its forward's graph is gone
        self._numbers = itertools.count(1)

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
        run = self._offload.run
        handle = run.submit_forward(
            self.layer,
            hidden_states,
            expert_ids,
            routing_weights,
            save_for_backward=keep,
            adapters=None if use_adapter else (),
            dropout_seed=dropout_seed,
            borrow=True,  # autograd waits for the result
        )
        output = handle.result()
        if not keep:
            return output, 0
        number = next(self._numbers)
        self._tickets[number] = _Ticket(run, handle.ticket)
        return output, number

    def backward(self, ticket: int, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        saved = self._tickets.get(ticket)
        if saved is None:
            raise WrongPhase(
                f"what the server had saved of this forward of layer {self.layer} has been released: a saved-tensor hook keeps "
                "a copy of its ticket instead of the ticket, as save_on_cpu(pin_memory=True) does; use pin_memory=False"
            )
        if self._offload.begins_window():
            saved.run.zero_grad()
        handle = saved.run.submit_backward(self.layer, saved.number, grad_output, borrow=True)
        result = handle.result()
        saved.is_consumed = True
        return result

    def release(self, ticket: int) -> None:
        saved = self._tickets.pop(ticket, None)
        if saved is not None and not saved.is_consumed:
            saved.run.release(saved.number)


class ModelOffload:
    """Owns the connection of one model. The run is opened when the first call or the adapter needs it."""

    def __init__(
        self,
        client: Client,
        model_types: Iterable[str],
        specs: Iterable[LocalLayerSpec],
        wire_dtype: str,
        options: RunOptions | None = None,
    ) -> None:
        self.client = client
        self.options = options or RunOptions()
        self.wire_dtype = wire_dtype
        self.lora: tuple[LayerLora, ...] = ()
        self.anchor: Anchor | None = None
        self._filled = 0.0
        self._pass = _NO_PASS  # the autograd pass whose first remote backward has been seen
        self._run: Run | None = None
        self.member = ALONE  # until the run is opened
        self._lock = threading.RLock()
        self.layers: dict[int, OffloadedLayer] = {}
        kinds = list(model_types)
        if client.model_type not in kinds:
            raise WrongPhase(
                f"this model is a {kinds[0]}, the server at {client.address} has loaded a {client.model_type}; start the "
                "server on the same checkpoint"
            )
        for spec in specs:
            _compare(spec, client)
            self.layers[spec.layer] = OffloadedLayer(self, spec.layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelOffload:
        """A copied model talks to the same server through the same run."""
        memo[id(self)] = self
        return self

    @property
    def run(self) -> Run:
        with self._lock:
            if self._run is None:
                # Without an adapter ranks have nothing in common: each computes in a run of its own.
                self.member = member = current_membership() if self.lora else ALONE
                name = member.name if member.name is None else self.client.unique_run_name(member.name)
                self._run = self.client.open_run(
                    name,
                    lora=self.lora,
                    rank=member.rank,
                    world_size=member.world_size,
                    wire_dtype=self.wire_dtype,
                    ephemeral=member.ephemeral,
                    options=self.options,
                )
                weakref.finalize(self, _leave_in_background, self._run).atexit = False
            return self._run

    def use_options(self, options: RunOptions) -> None:
        """For a run that is not open yet. Raises WrongPhase for another choice than that of an open one."""
        with self._lock:
            if self._run is not None and options != self.options:
                raise WrongPhase(
                    f"this model's run is open with {self.options} and {options} is asked for; give the options before the "
                    "adapter is created"
                )
            self.options = options

    def set_adapter(self, lora: Iterable[LayerLora], tensors: AdapterTensors, device: torch.device) -> Anchor:
        """Opens a run with this adapter; rank 0 uploads its values, the others wait for them."""
        with self._lock:
            previous, self._run = self._run, None
            self.lora = tuple(lora)
        if previous is not None:
            previous.leave()
        self.upload(tensors)
        self.anchor = Anchor(device)
        # The tensor holds its hooks where the garbage collector does not look, so this one must not hold the model.
        after_backward = weakref.WeakMethod(self._after_backward)

        def hook(parameter: torch.Tensor) -> None:
            method = after_backward()
            if method is not None:
                method(parameter)

        self.anchor.weight.register_post_accumulate_grad_hook(hook)
        return self.anchor

    def upload(self, tensors: AdapterTensors, step: int | None = None) -> None:
        """Replaces adapter tensors (or, with `step`, moments too) of the run, once for all members."""
        run = self.run
        if self.member.rank == 0 and tensors:
            run.put_adapter(tensors, step=step)
        if self.member.world_size > 1:
            run.grad_norm()  # a barrier: nobody computes before the values are there
        run.refresh_steps()

    def download(self, *, moments: bool = False) -> AdapterTensors:
        """The adapter's tensors, or its moments alone."""
        return self.run.get_adapter(parameters=not moments, moments=moments)

    def begins_window(self) -> bool:
        """True for the first backward after the gradients were cleared: anchor.grad is None or zero."""
        current = torch._C._current_graph_task_id()
        if self.anchor is None or current == self._pass:
            return False
        self._pass = current
        grad = self.anchor.weight.grad
        return grad is None or (self._filled != 0.0 and float(grad.item()) == 0.0)

    def _after_backward(self, parameter: torch.Tensor) -> None:
        """Runs once all experts of a backward are done: the anchor's gradient becomes the norm it stands for."""
        norm = self.run.grad_norm() if _synchronises_now() else 0.0
        assert parameter.grad is not None  # noqa: S101  # the hook runs after accumulation
        parameter.grad.fill_(max(norm, TINY_NORM))
        self._filled = float(parameter.grad.item())  # as the anchor's own dtype holds it

    def step(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        """The server's update, with the hyper-parameters of the group that holds the anchor."""
        if self.anchor is None or self.anchor.weight.grad is None:
            return
        update = translate(optimizer, group)
        if _found_inf(optimizer):
            return  # the gradient scaler has this step skipped
        is_new = not has_stepped(optimizer, self.anchor.weight)
        scale = float(self.anchor.weight.grad.item()) / self._filled / _grad_scale(optimizer)
        self.run.step(update, grad_scale=scale, new_optimizer=is_new)

    def close(self) -> None:
        """Leaves the run. The model cannot train afterwards; other models are not touched."""
        with self._lock:
            run, self._run = self._run, None
        if run is not None:
            run.leave()


def _leave_in_background(run: Run) -> None:
    """The model is gone. Its run is left on a thread of its own: finalizers must not wait."""
    threading.Thread(target=run.leave, name="kt-expert-leave", daemon=True).start()


def _found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """torch.amp.GradScaler's word to fused optimizers that this step is to be skipped."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) != 0.0


def _grad_scale(optimizer: torch.optim.Optimizer) -> float:
    """The factor gradients still carry: GradScaler leaves dividing by it to fused optimizers."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _synchronises_now() -> bool:
    """False in the micro-steps of a gradient accumulation that accelerate announces."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState._shared_state:
        return True
    return bool(state.GradientState().sync_gradients)


def _compare(spec: LocalLayerSpec, client: Client) -> None:
    """The handshake: raises WrongPhase with both sides' figures in one sentence."""
    remote = client.layers.get(spec.layer)
    if remote is None:
        raise WrongPhase(
            f"this model has experts in layer {spec.layer}, the {client.model_type} at {client.address} has none there; "
            "start the server on the same checkpoint"
        )
    ours = (spec.num_experts, spec.hidden_size, spec.intermediate_size, spec.activation, spec.has_bias)
    theirs = (
        remote.num_experts,
        remote.hidden_size,
        remote.intermediate_size,
        remote.activation,
        remote.has_bias,
    )
    same_numbers = spec.activation == "silu" or (
        abs(spec.alpha - remote.alpha) < 1e-5 and abs(spec.limit - remote.limit) < 1e-5
    )
    if ours != theirs or not same_numbers:
        raise WrongPhase(
            f"layer {spec.layer} of this model has (experts, hidden, intermediate, activation, bias) = {ours}, the server at "
            f"{client.address} has {theirs}; start the server on the same checkpoint"
        )


class OptimizerHook:
    """One process-wide hook: when an optimizer that holds an anchor steps, the server steps too."""

    def __init__(self) -> None:
        self._offloads: weakref.WeakSet[ModelOffload] = weakref.WeakSet()
        self._remove: Callable[[], None] | None = None

    def watch(self, offload: ModelOffload) -> None:
        self._offloads.add(offload)
        if self._remove is None:
            from torch.optim.optimizer import register_optimizer_step_pre_hook

            self._remove = register_optimizer_step_pre_hook(self._before_step).remove

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = any(callable(argument) for argument in (*args[1:], *kwargs.values()))
        for offload in list(self._offloads):
            if offload.anchor is None:
                continue
            for group in optimizer.param_groups:
                if any(parameter is offload.anchor.weight for parameter in group["params"]):
                    if closure:
                        raise UnsupportedModel(
                            "optimizer.step(closure) computes gradients after the server has to know them; call backward, "
                            "then step without a closure"
                        )
                    offload.step(optimizer, group)
