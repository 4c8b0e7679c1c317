"""Matrices on the server: parameters, their gradients and their moments are made of the same tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from kt_expert_proto.lora import GRADIENT, PARAMETER, tensor_bits

from kt_expert_client.adapter import TensorKey
from kt_expert_client.errors import UnsupportedModel, WrongPhase
from kt_expert_client.parameters.tensor import LateCopies, source_behind, source_of

if TYPE_CHECKING:
    from kt_expert_client.parameters.store import ParameterStore

GATE_UP, DOWN = "gate_up", "down"
A, B, WEIGHT, BIAS = "A", "B", "weight", "bias"
# The server's tensors a matrix is made of.
_TENSORS = {
    (GATE_UP, A): ("a_gate",),
    (GATE_UP, B): ("b_gate", "b_up"),
    (GATE_UP, WEIGHT): ("w_gate", "w_up"),
    (GATE_UP, BIAS): ("bias_gate", "bias_up"),
    (DOWN, A): ("a_down",),
    (DOWN, B): ("b_down",),
    (DOWN, WEIGHT): ("w_down",),
    (DOWN, BIAS): ("bias_down",),
}
_NAMES = {A: "lora_A of {}", B: "lora_B of {}", WEIGHT: "the weights {}", BIAS: "the biases {}"}


@dataclass(frozen=True, slots=True)
class Place:
    """Which matrix of which adapter: `side` is A or B of LoRA on the parameter `target`, or that parameter or its bias."""

    adapter: str  # the server's name
    layer: int
    target: str
    side: str

    @property
    def tensors(self) -> tuple[str, ...]:
        """The server's tensors it is made of."""
        return _TENSORS[self.target, self.side]

    @property
    def bits(self) -> int:
        return tensor_bits(self.tensors)

    def __str__(self) -> str:
        return f"{_NAMES[self.side].format(self.target)} in layer {self.layer}, adapter {self.adapter!r}"


class Matrix(ABC):
    """One matrix in the layout the trainer knows."""

    def __init__(self, store: ParameterStore, place: Place) -> None:
        self.store, self.place = store, place

    @abstractmethod
    def read(self, part: str) -> torch.Tensor:
        """fp32 on the CPU."""

    @abstractmethod
    def write(self, values: torch.Tensor, part: str, *, step: int = 0) -> None:
        """Replaces all of it; `step` is what a moment counts."""

    @abstractmethod
    def copy(self, memo: dict[int, Any]) -> Matrix:
        """In a copy of its adapter, which is made once for all matrices that are copied with one memo."""

    def prepare(self) -> None:  # noqa: B027  # most matrices are there from the start
        """A gradient of it is wanted. Raises OutOfCapacity where the server cannot train it."""

    def _key(self, tensor: str, part: str) -> TensorKey:
        return TensorKey(self.place.layer, tensor, part, self.place.adapter)


class ParameterSource:
    """The matrix's values. Implements Source."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix, self.copies = matrix, LateCopies()

    @property
    def name(self) -> str:
        return str(self.matrix.place)

    def read(self) -> torch.Tensor:
        return self.matrix.read(PARAMETER)

    def write(self, values: torch.Tensor) -> None:
        self.copies.keep(self)
        self.matrix.write(values, PARAMETER)

    def copy(self, memo: dict[int, Any]) -> ParameterSource:
        return ParameterSource(self.matrix.copy(memo))

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

    copies = None

    def __init__(self, matrix: Matrix, generation: int) -> None:
        self.matrix, self.generation = matrix, generation

    @property
    def name(self) -> str:
        return f"the gradient of {self.matrix.place}"

    def read(self) -> torch.Tensor:
        self._require_one_rank()
        self.matrix.store.gradients.require_live(self)
        self.matrix.store.gradients.flush()
        return self.matrix.read(GRADIENT)

    def _require_one_rank(self) -> None:
        ranks = self.matrix.store.world_size
        if ranks > 1:
            raise UnsupportedModel(
                f"{self.name} is averaged over {ranks} ranks in the step, and no rank has the average; ask for its norm, or "
                "load the model with RunOptions(lora_location='trainer')"
            )

    def write(self, values: torch.Tensor) -> None:
        self._require_one_rank()
        self.matrix.store.gradients.require_live(self)
        self.matrix.store.gradients.flush()
        self.matrix.write(values, GRADIENT)
        self.matrix.store.gradients.changed()


class MomentSource(_Snapshot):
    """What an optimizer keeps of the matrix. The server keeps one set: `generation` says which. Implements Source."""

    def __init__(self, matrix: Matrix, slot: str, generation: int) -> None:
        self.matrix, self.slot, self.generation, self.copies = matrix, slot, generation, LateCopies()

    @property
    def name(self) -> str:
        return f"{self.slot} of {self.matrix.place}"

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
        self.copies.keep(self)
        self.matrix.write(values, self.slot, step=self.matrix.store.updates_of(self.matrix))


def matrix_of(tensor: object) -> Matrix | None:
    """The matrix a parameter stands for; None for any other tensor, and for a copy."""
    source = source_of(tensor)
    return source.matrix if isinstance(source, ParameterSource) else None


def matrix_behind(tensor: object) -> Matrix | None:
    """The same, also of a copy in another dtype, as a forward makes one of its parameters."""
    source = source_behind(tensor)
    return source.matrix if isinstance(source, ParameterSource) else None


def gradient_of(tensor: object) -> GradientSource | None:
    """What a gradient is; None for any other tensor."""
    source = source_of(tensor)
    return source if isinstance(source, GradientSource) else None


def is_same_gradient(left: object, right: object) -> bool:
    """Whether both are the same gradient of the same parameter."""
    ours, theirs = gradient_of(left), gradient_of(right)
    if ours is None or theirs is None:
        return False
    return ours.matrix is theirs.matrix and ours.generation == theirs.generation
