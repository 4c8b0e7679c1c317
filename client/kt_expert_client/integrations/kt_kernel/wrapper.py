"""kt-kernel's wrapper of one layer's experts (kt_kernel/sft/base.py and amx.py, 0.7.2), over a run on a server.

It is called without autograd: the caller hands it gradients, keeps LoRA's matrices and their gradients in tensors of its own,
and optimizes them itself. Models of transformers have no need of it: see offload_experts.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from kt_expert_proto.lora import GRADIENT, LORA_TENSORS, PARAMETER, tensor_bits
from kt_expert_proto.v1 import service_pb2 as pb
from torch import nn

from kt_expert_client.adapter import ActiveAdapter, GradientTarget, LayerLora, TensorKey
from kt_expert_client.errors import InvalidRequest, UnsupportedModel, WrongPhase
from kt_expert_client.run import BackwardHandle, ForwardHandle, Run

_SIDES = {
    "a_gate": "gate_lora_a", "b_gate": "gate_lora_b", "a_up": "up_lora_a", "b_up": "up_lora_b",
    "a_down": "down_lora_a", "b_down": "down_lora_b",
}  # fmt: skip
_NOT_HERE = {
    "load_weights_from_tensors": "the server loads the base weights: start it on the checkpoint",
    "update_base_weights": "train weights in full with kt_expert_client.train_in_full(model)",
    "init_full_weight_grad_buffers": "train weights in full with kt_expert_client.train_in_full(model)",
    "submit_forward_inference": "call submit_forward(..., save_for_backward=False)",
    "sync_forward_inference": "call sync_forward()",
    "save_backward_weights_from_tensors": "backward needs no weights of its own",
}
_FLOATS = (torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False, slots=True)
class _Matrix:
    """One of LoRA's six: the caller's tensor, and the one that its gradient goes to."""

    values: torch.Tensor
    gradient: torch.Tensor


@dataclass(frozen=True, eq=False, slots=True)
class _Going:
    """A call that was submitted."""

    handle: Any
    device: torch.device | None = None
    top_k: int = 0  # of a forward that is saved
    scale: float = 1.0


class KTMoEWrapper:
    """One layer of `run`; `spec` is its entry in Client.layers. One call at a time, as in kt-kernel.

    Shapes, for T tokens, k routes a token, E experts, hidden size H, intermediate size I and rank r: hidden states, outputs and
    their gradients [T, H] in any float dtype, expert ids [T, k] (one outside 0 to E - 1 is skipped), weights [T, k], LoRA's a
    [E, r, H] (down: [E, r, I]) and b [E, I, r] (down: [E, H, r]) in bf16 or fp32. Forwards that were saved wait for their
    backwards, the newest first; beyond max_cache_depth the newest takes the place of the one before it, as in kt-kernel.
    """

    def __init__(
        self,
        run: Run,
        spec: pb.LayerSpec,
        *,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        max_cache_depth: int = 1,
        adapter: str = "kt-kernel",
    ) -> None:
        if lora_rank < 0 or max_cache_depth < 1:
            raise InvalidRequest(f"lora_rank {lora_rank} and max_cache_depth {max_cache_depth}: expected 0 and 1 or more")
        self.layer_idx = int(spec.layer)
        self.num_experts, self.num_experts_per_tok = int(spec.num_experts), int(spec.top_k)
        self.hidden_size, self.moe_intermediate_size = int(spec.hidden_size), int(spec.intermediate_size)
        self.lora_rank, self.lora_alpha = lora_rank, lora_alpha
        self.lora_scaling = lora_alpha / lora_rank if lora_rank else 0.0
        self.max_cache_depth = max_cache_depth
        self._run, self._adapter = run, adapter
        self._lora: dict[str, _Matrix] = {}
        self._saved: deque[tuple[int, int]] = deque()  # tickets and their routes a token, the newest last
        self._forward: _Going | None = None
        self._backward: _Going | None = None

    @property
    def lora(self) -> dict[str, torch.Tensor]:
        """The caller's own tensors by kt-kernel's names: gate_lora_a and so on; none before init_lora_weights."""
        return {_SIDES[name]: matrix.values for name, matrix in self._lora.items()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,  # by position too, as kt-kernel has it
        output_device: torch.device | None = None,
    ) -> torch.Tensor:
        """The experts' output, on output_device or the CPU. Raises what submit_forward and the server raise."""
        self.submit_forward(hidden_states, expert_ids, weights, save_for_backward)
        return self.sync_forward(output_device)

    def submit_forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,  # by position too, as kt-kernel has it
    ) -> None:
        """Sends the batch and returns. Raises WrongPhase where a call is not synchronised, InvalidRequest for wrong shapes."""
        self._expect_idle()
        is_there = (expert_ids >= 0) & (expert_ids < self.num_experts)
        handle = self._run.submit_forward(
            self.layer_idx,
            hidden_states.detach(),
            torch.where(is_there, expert_ids, self.num_experts),
            weights.detach(),
            save_for_backward=save_for_backward,
            adapters=(ActiveAdapter(self._adapter),) if self._lora else (),
            dropout_seed=0,
        )
        self._forward = _Going(handle, top_k=int(expert_ids.shape[1]) if save_for_backward else 0)

    def sync_forward(self, output_device: torch.device | None = None) -> torch.Tensor:
        """Waits for the batch that was submitted last. Raises WrongPhase without one."""
        going, self._forward = self._forward, None
        if going is None:
            raise WrongPhase("no forward is pending; call submit_forward first")
        handle: ForwardHandle = going.handle
        output = handle.result()
        if going.top_k:
            while len(self._saved) >= self.max_cache_depth:
                self._run.release(self._saved.pop()[0])
            self._saved.append((handle.ticket, going.top_k))
        return output.to(output_device or "cpu")

    def backward(
        self, grad_output: torch.Tensor, output_device: torch.device | None = None, optimizer_grad_scale: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden states [T, H] and of weights fp32 [T, k]; LoRA's go to the tensors that init_lora_weights got."""
        self.submit_backward_async(grad_output, output_device, optimizer_grad_scale)
        return self.sync_backward()

    def submit_backward_async(
        self, grad_output: torch.Tensor, output_device: torch.device | None = None, optimizer_grad_scale: float = 1.0
    ) -> None:
        """Sends the gradient of the newest saved forward's output. LoRA's gradients are multiplied with optimizer_grad_scale.
        Raises WrongPhase where none is saved or a call is not synchronised, InvalidRequest for a scale that is not positive."""
        self._expect_idle()
        if not math.isfinite(optimizer_grad_scale) or optimizer_grad_scale <= 0.0:
            raise InvalidRequest(f"optimizer_grad_scale is {optimizer_grad_scale}, expected a positive number")
        for name, matrix in self._lora.items():
            own = matrix.values.grad if isinstance(matrix.values, nn.Parameter) else None
            if own is not None and own is not matrix.gradient:
                raise InvalidRequest(
                    f"the gradient of {_SIDES[name]} is another tensor than the one that was registered for it"
                )
        if not self._saved:
            raise WrongPhase("no forward is saved; call forward(save_for_backward=True) first")
        bits = tensor_bits(self._lora)
        ticket, top_k = self._saved[-1]
        handle = self._run.submit_backward(
            self.layer_idx,
            ticket,
            grad_output.detach(),
            targets=[GradientTarget(self._adapter, bits, replaced=bits)] if bits else [],
            top_k=top_k,
        )
        self._saved.pop()
        self._backward = _Going(handle, output_device, scale=optimizer_grad_scale)

    def sync_backward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Waits for the gradient that was submitted last. Raises WrongPhase without one."""
        going, self._backward = self._backward, None
        if going is None:
            raise WrongPhase("no backward is pending; call submit_backward_async first")
        handle: BackwardHandle = going.handle
        grad_hidden, grad_weights = handle.result()
        for name, matrix in self._lora.items():
            shape = (matrix.values.shape[0], matrix.values.shape[1], matrix.values.shape[2])
            key = TensorKey(self.layer_idx, name, GRADIENT, self._adapter)
            _collect(matrix, self._run.adapters.read(key, shape) * going.scale)
        device = going.device or "cpu"
        return grad_hidden.to(device), grad_weights.to(device)

    def load_weights(self, physical_to_logical_map_cpu: torch.Tensor | None = None) -> None:
        """The server has them. Raises UnsupportedModel for a map that gives experts other numbers."""
        moved = physical_to_logical_map_cpu
        if moved is not None and not torch.equal(moved.flatten().cpu().long(), torch.arange(self.num_experts)):
            raise UnsupportedModel(
                "physical_to_logical_map gives experts other numbers than the checkpoint; the server has those"
            )

    def init_lora_weights(
        self,
        gate_lora_a: torch.Tensor, gate_lora_b: torch.Tensor,
        up_lora_a: torch.Tensor, up_lora_b: torch.Tensor,
        down_lora_a: torch.Tensor, down_lora_b: torch.Tensor,
        grad_gate_lora_a: torch.Tensor, grad_gate_lora_b: torch.Tensor,
        grad_up_lora_a: torch.Tensor, grad_up_lora_b: torch.Tensor,
        grad_down_lora_a: torch.Tensor, grad_down_lora_b: torch.Tensor,
    ) -> None:  # fmt: skip
        """Gives the server LoRA's values, gate and up each with an A of their own. Each backward writes gradients into the
        grad_ tensors: of a Parameter it becomes the gradient, and adds up until that is None again; of a plain tensor it is
        the last backward's alone. Raises InvalidRequest for other shapes and dtypes."""
        values = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        gradients = (
            grad_gate_lora_a, grad_gate_lora_b, grad_up_lora_a, grad_up_lora_b, grad_down_lora_a, grad_down_lora_b,
        )  # fmt: skip
        if not self.lora_rank:
            raise InvalidRequest("this wrapper was made with lora_rank 0")
        for name, value, gradient in zip(LORA_TENSORS, values, gradients, strict=True):
            self._check(_SIDES[name], value, name)
            self._check(f"grad_{_SIDES[name]}", gradient, name)
        rank, scale = self.lora_rank, self.lora_scaling
        lora = LayerLora(self.layer_idx, False, rank, rank, rank, scale, scale, scale)
        self._run.adapters.create(self._adapter, [lora])
        self._lora = {
            name: _Matrix(value, gradient) for name, value, gradient in zip(LORA_TENSORS, values, gradients, strict=True)
        }
        self.update_lora_weights()

    def update_lora_weights(self) -> None:
        """Gives the server what is in the tensors now: after each step of the optimizer. Raises WrongPhase without LoRA."""
        if not self._lora:
            raise WrongPhase("LoRA is not initialised; call init_lora_weights first")
        writing = [
            self._run.adapters.submit_write(TensorKey(self.layer_idx, name, PARAMETER, self._adapter), matrix.values)
            for name, matrix in self._lora.items()
        ]
        for each in writing:
            each.wait()

    def submit_backward_repack(self) -> None:
        """Nothing to be done: backward reads the weights as forward has them."""

    def wait_backward_repack(self) -> None:
        """Nothing to be waited for: see submit_backward_repack."""

    def __getattr__(self, name: str) -> Any:
        if name in _NOT_HERE:
            raise UnsupportedModel(f"{name} has no meaning with a server: {_NOT_HERE[name]}")
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def _check(self, name: str, tensor: torch.Tensor, kind: str) -> None:
        experts, hidden, intermediate, rank = self.num_experts, self.hidden_size, self.moe_intermediate_size, self.lora_rank
        inputs, outputs = (intermediate, hidden) if kind.endswith("down") else (hidden, intermediate)
        expected = (experts, rank, inputs) if kind.startswith("a_") else (experts, outputs, rank)
        if tuple(tensor.shape) != expected or tensor.dtype not in _FLOATS:
            raise InvalidRequest(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {expected} in bf16 or fp32")

    def _expect_idle(self) -> None:
        if self._forward is not None or self._backward is not None:
            kind = "sync_forward" if self._forward is not None else "sync_backward"
            raise WrongPhase(f"a call is pending; call {kind} first")


def _collect(matrix: _Matrix, gradient: torch.Tensor) -> None:
    """Adds one backward's gradient to the caller's tensor, or puts it there."""
    is_parameter = isinstance(matrix.values, nn.Parameter)
    with torch.no_grad():
        if is_parameter and matrix.values.grad is not None:
            matrix.gradient.add_(gradient.to(matrix.gradient.device))
        else:
            matrix.gradient.copy_(gradient)
    if is_parameter:
        matrix.values.grad = matrix.gradient
