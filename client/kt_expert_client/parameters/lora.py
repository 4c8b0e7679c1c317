"""PEFT's LoRA matrices of fused expert parameters, whose values, gradients and moments are on the server.

PEFT keeps for E experts lora_A as [r * E, in] and lora_B as [out, r * E]; the server has a_* as [E, r, in] and b_* as
[E, out, r], with gate and up apart and one A for both (peft_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from kt_expert_proto.lora import GRADIENT, PARAMETER, tensor_bits

from kt_expert_client import peft_layout
from kt_expert_client.adapter import TensorKey
from kt_expert_client.errors import WrongPhase
from kt_expert_client.parameters.tensor import RemoteTensor, Stored

if TYPE_CHECKING:
    from kt_expert_client.parameters.store import ParameterStore

GATE_UP, DOWN = "gate_up", "down"


@dataclass(frozen=True, slots=True)
class LoraPlace:
    """Which matrix of which adapter: `side` is "A" or "B" of the parameter `target`."""

    adapter: str  # the server's name
    layer: int
    target: str
    side: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """The server's tensors it is made of."""
        if self.target == DOWN:
            return ("a_down",) if self.side == "A" else ("b_down",)
        return ("a_gate",) if self.side == "A" else ("b_gate", "b_up")

    @property
    def bits(self) -> int:
        return tensor_bits(self.tensors)


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Sizes of one projection's LoRA, and whether its outputs lie gate, up, gate, up."""

    experts: int
    rank: int
    inputs: int
    outputs: int
    interleaved: bool


class LoraMatrix:
    """One matrix as a trainer's parameter, its gradient and its moments are made of the same tensors."""

    def __init__(self, store: ParameterStore, place: LoraPlace, shape: LoraShape) -> None:
        self.store, self.place, self.shape = store, place, shape

    @property
    def size(self) -> tuple[int, int]:
        shape = self.shape
        if self.place.side == "A":
            return shape.rank * shape.experts, shape.inputs
        return shape.outputs, shape.rank * shape.experts

    def read(self, part: str) -> torch.Tensor:
        """[r * E, in] or [out, r * E], fp32."""
        place = self.place
        parts = [self.store.read(self._key(name, part), self._size_of(name)) for name in place.tensors]
        if place.side == "A":
            return peft_layout.a_to_peft(parts[0])
        whole = parts[0]
        if place.target == GATE_UP:
            whole = peft_layout.join_gate_up(parts[0], parts[1], interleaved=self.shape.interleaved)
        return peft_layout.b_to_peft(whole)

    def write(self, values: torch.Tensor, part: str, *, step: int = 0) -> None:
        place, experts = self.place, self.shape.experts
        parts: Sequence[torch.Tensor]
        if place.side == "A":
            parts = [peft_layout.a_from_peft(values, experts)]
        else:
            whole = peft_layout.b_from_peft(values, experts)
            parts = [whole] if place.target == DOWN else peft_layout.split_gate_up(whole, interleaved=self.shape.interleaved)
        for name, part_values in zip(place.tensors, parts, strict=True):
            self.store.write(self._key(name, part), part_values, step=step)

    def _key(self, tensor: str, part: str) -> TensorKey:
        return TensorKey(self.place.layer, tensor, part, self.place.adapter)

    def _size_of(self, tensor: str) -> tuple[int, int, int]:
        shape = self.shape
        if tensor.startswith("a_"):
            return shape.experts, shape.rank, shape.inputs
        outputs = shape.outputs // 2 if self.place.target == GATE_UP else shape.outputs
        return shape.experts, outputs, shape.rank


class ParameterSource:
    """The matrix's values. Implements Source."""

    def __init__(self, matrix: LoraMatrix) -> None:
        self.matrix = matrix

    @property
    def name(self) -> str:
        place = self.matrix.place
        return f"lora_{place.side} of {place.target} in layer {place.layer}, adapter {place.adapter!r}"

    def read(self) -> torch.Tensor:
        return self.matrix.read(PARAMETER)

    def write(self, values: torch.Tensor) -> None:
        self.matrix.write(values, PARAMETER)

    def copy(self, memo: dict[int, Any]) -> ParameterSource:
        """Of a copy of the adapter, which is made once for all its matrices that are copied together."""
        return ParameterSource(self.matrix.store.copy_of(self.matrix, memo))

    def adopted(self, parameter: torch.Tensor) -> None:
        self.matrix.store.gradients.add(self.matrix, parameter)


class _Snapshot:
    """A copy of it is a plain tensor."""

    def copy(self, memo: dict[int, Any]) -> None:
        del memo

    def adopted(self, parameter: torch.Tensor) -> None:
        """No parameter stands for it."""


class GradientSource(_Snapshot):
    """A gradient of the matrix: one that was begun and not cleared since. Implements Source."""

    def __init__(self, matrix: LoraMatrix, generation: int) -> None:
        self.matrix, self.generation = matrix, generation

    @property
    def name(self) -> str:
        return "the gradient of " + ParameterSource(self.matrix).name

    def read(self) -> torch.Tensor:
        self.matrix.store.gradients.require_live(self)
        self.matrix.store.gradients.flush()
        return self.matrix.read(GRADIENT)

    def write(self, values: torch.Tensor) -> None:
        self.matrix.store.gradients.require_live(self)
        self.matrix.store.gradients.flush()
        self.matrix.write(values, GRADIENT)
        self.matrix.store.gradients.changed()


class MomentSource(_Snapshot):
    """What an optimizer keeps of the matrix. The server keeps one set: `generation` says which. Implements Source."""

    def __init__(self, matrix: LoraMatrix, slot: str, generation: int) -> None:
        self.matrix, self.slot, self.generation = matrix, slot, generation

    @property
    def name(self) -> str:
        return f"{self.slot} of " + ParameterSource(self.matrix).name

    def require_live(self) -> None:
        """Raises WrongPhase where another optimizer has begun since."""
        if self.generation != self.matrix.store.moments_of(self.matrix):
            raise WrongPhase(
                f"{self.name} was given up when another optimizer stepped; the server keeps the moments of one optimizer for "
                "each parameter. Load the first one's state dict, saved before, to go on with it"
            )

    def read(self) -> torch.Tensor:
        self.require_live()
        return self.matrix.read(self.slot)

    def write(self, values: torch.Tensor) -> None:
        self.require_live()
        self.matrix.write(values, self.slot, step=self.matrix.store.updates_of(self.matrix))


def matrix_of(tensor: object) -> LoraMatrix | None:
    """The matrix a parameter stands for; None for any other tensor."""
    if isinstance(tensor, RemoteTensor) and isinstance(tensor.remote, Stored):
        source = tensor.remote.source
        return source.matrix if isinstance(source, ParameterSource) else None
    return None


def gradient_of(tensor: object) -> GradientSource | None:
    """What a gradient is; None for any other tensor."""
    if isinstance(tensor, RemoteTensor) and isinstance(tensor.remote, Stored):
        return tensor.remote.source if isinstance(tensor.remote.source, GradientSource) else None
    return None


def is_same_gradient(left: object, right: object) -> bool:
    """Whether both are the same gradient of the same parameter."""
    ours, theirs = gradient_of(left), gradient_of(right)
    if ours is None or theirs is None:
        return False
    return ours.matrix is theirs.matrix and ours.generation == theirs.generation


def make_parameter(matrix: LoraMatrix, like: torch.Tensor, *, requires_grad: bool) -> torch.nn.Parameter:
    """A parameter of that matrix with the shape, dtype and device of `like`."""
    geometry = torch.empty(matrix.size, dtype=like.dtype, device="meta")
    device = torch.device("cpu") if like.is_meta else like.device
    remote = RemoteTensor(Stored(ParameterSource(matrix)), geometry, device=device)
    return torch.nn.Parameter(remote, requires_grad=requires_grad)
