"""One model whose experts are elsewhere: its run on the server, its layers, and its gradient window."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kt_expert_client.adapter import GradientTarget
from kt_expert_client.autograd import BackwardResult, ExpertsCall, ForwardResult
from kt_expert_client.connection import Client
from kt_expert_client.errors import InvalidRequest, KtExpertError, UnsupportedModel, WrongPhase
from kt_expert_client.membership import ALONE, current_membership
from kt_expert_client.options import RunOptions
from kt_expert_client.parameters.existing import meet_existing
from kt_expert_client.parameters.gradients import handle
from kt_expert_client.parameters.matrix import matrix_behind
from kt_expert_client.parameters.mirror import MirrorMatrix
from kt_expert_client.parameters.store import Joined, ParameterStore
from kt_expert_client.run import Run
from kt_expert_client.sent import SentBackward, SentForward


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


@dataclass(frozen=True, slots=True)
class _Ticket:
    """A forward's saved state on the server, and the run that has it: the model may have another one by now."""

    run: Run
    number: int
    top_k: int


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

    def submit(
        self, hidden_states: torch.Tensor, routing_weights: torch.Tensor, call: ExpertsCall, *, borrow: bool
    ) -> ForwardResult:
        self._require_finite(hidden_states=hidden_states, routing_weights=routing_weights)
        self._offload.parameters.settle()
        run = self._offload.parameters.run
        handle = run.submit_forward(
            self.layer,
            hidden_states,
            call.expert_ids,
            routing_weights,
            save_for_backward=call.keep,
            adapters=call.adapters,
            dropout_seed=call.dropout_seed,
            borrow=borrow,
        )
        sent = SentForward(run, handle, self._keep if call.keep else None, call.expert_ids.shape[1])
        try:
            if call.meanwhile is not None:
                call.meanwhile()
        except BaseException:
            sent.abandon()
            raise
        return sent

    def _keep(self, run: Run, ticket: int, top_k: int) -> torch.Tensor:
        """A number for the ticket, in a tensor: the ticket is released once the tensor's storage is gone."""
        number = next(self._numbers)
        self._offload.parameters.open_tickets += 1
        self._tickets[number] = _Ticket(run, ticket, top_k)
        kept = torch.tensor([number], dtype=torch.int64)
        # Of the storage: selective checkpointing keeps another tensor with it.
        weakref.finalize(kept.untyped_storage(), self.release, number).atexit = False
        return kept

    def submit_backward(self, ticket: int, grad_output: torch.Tensor, parameters: Sequence[torch.Tensor]) -> BackwardResult:
        saved = self._tickets.get(ticket)
        if saved is None:
            raise WrongPhase(
                f"what the server had saved of this forward of layer {self.layer} has been released: a saved-tensor hook keeps "
                "a copy of its ticket instead of the ticket, as save_on_cpu(pin_memory=True) does; use pin_memory=False"
            )
        self._require_finite(grad_output=grad_output)
        gradients: list[torch.Tensor] = []
        targets: dict[str, GradientTarget] = {}
        mirrored: list[tuple[int, MirrorMatrix, torch.Tensor]] = []
        for parameter in parameters:
            matrix = matrix_behind(parameter)
            if parameter is self._offload.ddp_parameter:
                gradients.append(torch.zeros_like(parameter))
                continue
            if matrix is None:
                raise UnsupportedModel(f"{parameter!r} is to be trained and is nothing that the server knows")
            name, bits = matrix.place.adapter, matrix.place.bits
            if isinstance(matrix, MirrorMatrix):
                mirrored.append((len(gradients), matrix, parameter))
                replaced, continued = bits, 0
                gradients.append(parameter)  # until the server has it
            else:
                gradient, replaced, continued = self._offload.parameters.gradients.target(matrix, parameter)
                gradients.append(handle(gradient, parameter))
            old = targets.get(name, GradientTarget(name, 0))
            targets[name] = GradientTarget(name, old.wanted | bits, old.replaced | replaced, old.continued | continued)
        backward = saved.run.submit_backward(
            self.layer,
            saved.number,
            grad_output,
            targets=targets.values(),
            keep_ticket=True,
            top_k=saved.top_k,
            borrow=True,
        )
        return SentBackward(backward, gradients, mirrored)

    def _require_finite(self, **tensors: torch.Tensor) -> None:
        """Where the run is to refuse other values. Raises InvalidRequest."""
        if self._offload.options.non_finite == "allow":
            return
        for name, tensor in tensors.items():
            rows = (~torch.isfinite(tensor)).any(dim=-1).nonzero().flatten()
            if rows.numel():
                raise InvalidRequest(
                    f"{name} of layer {self.layer} holds values that are not finite, in {rows.numel()} of {tensor.shape[0]} "
                    f"tokens, the first in token {int(rows[0])}; non_finite='allow' computes with them"
                )

    def release(self, ticket: int) -> None:
        saved = self._tickets.pop(ticket, None)
        if saved is not None:
            self._offload.parameters.open_tickets -= 1
            saved.run.release(saved.number)


class ModelOffload:
    """Owns the connection of one model. The run is opened when the first call or an adapter needs it.

    `number` counts the models of a process, without those that are a rank's alone: ranks find each other by it.
    """

    def __init__(
        self,
        client: Client,
        model_types: Iterable[str],
        specs: Iterable[LocalLayerSpec],
        wire_dtype: str,
        options: RunOptions | None = None,
        number: int = 1,
    ) -> None:
        self.client = client
        self._number = number
        self.options = options or RunOptions()
        self.wire_dtype = wire_dtype
        self.parameters = ParameterStore(self._open_run, self.options.dropout)
        self.layers: dict[int, OffloadedLayer] = {}
        self.ddp_parameter: torch.nn.Parameter | None = None
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
        return self.parameters.run

    def _open_run(self) -> Joined:
        member = ALONE if self.options.alone else current_membership(self._number)
        name = member.name if member.name is None else self.client.unique_run_name(member.name)
        run = self.client.open_run(
            name,
            rank=member.rank,
            world_size=member.world_size,
            wire_dtype=self.wire_dtype,
            ephemeral=member.ephemeral,
            options=self.options,
        )
        weakref.finalize(self, _leave_in_background, run).atexit = False
        try:
            return Joined(run, member, meet_existing(run, self.options))
        except KtExpertError:
            run.leave()
            raise

    def use_ddp_parameter(self, parameter: torch.nn.Parameter) -> None:
        """From now on every experts call depends on it, and its gradient is zero: see NamesForDdp."""
        self.ddp_parameter = parameter

    def use_options(self, options: RunOptions) -> None:
        """For a run that is not open yet. Raises WrongPhase for another choice than that of an open one."""
        if self.parameters.is_open and options != self.options:
            raise WrongPhase(
                f"this model's run is open with {self.options} and {options} is asked for; give the options before the "
                "adapter is created"
            )
        if options != self.options:
            self.options = options
            self.parameters.use_dropout(options.dropout)

    def close(self) -> None:
        """Leaves the run. The model cannot train afterwards; other models are not touched."""
        self.parameters.leave()


def _leave_in_background(run: Run) -> None:
    """The model is gone. Its run is left on a thread of its own: finalizers must not wait."""
    threading.Thread(target=run.leave, name="kt-expert-leave", daemon=True).start()


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
