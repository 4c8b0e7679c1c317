"""PEFT's LoRA matrices of fused expert parameters, whose values, gradients and moments are on the server.

PEFT keeps for E experts lora_A as [r * E, in] and lora_B as [out, r * E]; the server has a_* as [E, r, in] and b_* as
[E, out, r], with gate and up apart and one A for both (peft_layout.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from kt_expert_proto.lora import PARAMETER

from kt_expert_client import peft_layout
from kt_expert_client.parameters.matrix import GATE_UP, A, Matrix, ParameterSource, Place
from kt_expert_client.parameters.tensor import RemoteTensor, Stored

if TYPE_CHECKING:
    from kt_expert_client.parameters.store import ParameterStore


@dataclass(frozen=True, slots=True)
class LoraShape:
    """Sizes of one projection's LoRA, and whether its outputs lie gate, up, gate, up. `swapped`: PEFT's lora_A is B and its
    lora_B is A, as PEFT before 0.19 has them for weights [E, out, in]."""

    experts: int
    rank: int
    inputs: int
    outputs: int
    interleaved: bool
    swapped: bool = False


class LoraMatrix(Matrix):
    """lora_A or lora_B of one parameter."""

    def __init__(self, store: ParameterStore, place: Place, shape: LoraShape) -> None:
        super().__init__(store, place)
        self.shape = shape

    @property
    def size(self) -> tuple[int, int]:
        """PEFT's."""
        shape = self.shape
        outer = shape.inputs if self.place.side == A else shape.outputs
        together = shape.rank * shape.experts
        return (together, outer) if self._is_peft_a else (outer, together)

    @property
    def _is_peft_a(self) -> bool:
        return (self.place.side == A) != self.shape.swapped

    def read(self, part: str) -> torch.Tensor:
        """As PEFT has it: lora_A [r * E, in] or lora_B [out, r * E], fp32."""
        values = self.read_by_expert(part)
        if self.shape.swapped:
            values = values.transpose(1, 2)
        return peft_layout.a_to_peft(values) if self._is_peft_a else peft_layout.b_to_peft(values)

    def read_by_expert(self, part: str) -> torch.Tensor:
        """A [E, r, in] or B [E, out, r], fp32."""
        place = self.place
        parts = [self.store.read(self._key(name, part), self._size_of(name)) for name in place.tensors]
        if len(parts) == 1:
            return parts[0]
        return peft_layout.join_gate_up(parts[0], parts[1], interleaved=self.shape.interleaved)

    def write(self, values: torch.Tensor, part: str, *, step: int = 0) -> None:
        place, experts = self.place, self.shape.experts
        from_peft = peft_layout.a_from_peft if self._is_peft_a else peft_layout.b_from_peft
        whole = from_peft(values, experts)
        if self.shape.swapped:
            whole = whole.transpose(1, 2)
        parts: Sequence[torch.Tensor] = [whole]
        if len(place.tensors) > 1:
            parts = peft_layout.split_gate_up(whole, interleaved=self.shape.interleaved)
        for name, part_values in zip(place.tensors, parts, strict=True):
            self.store.write(self._key(name, part), part_values, step=step)
        if part == PARAMETER:
            self.store.changed([place])

    def copy(self, memo: dict[int, Any]) -> LoraMatrix:
        return self.store.copy_of(self, memo)

    def _size_of(self, tensor: str) -> tuple[int, int, int]:
        shape = self.shape
        if tensor.startswith("a_"):
            return shape.experts, shape.rank, shape.inputs
        outputs = shape.outputs // 2 if self.place.target == GATE_UP else shape.outputs
        return shape.experts, outputs, shape.rank


def make_parameter(matrix: LoraMatrix, like: torch.Tensor, *, requires_grad: bool) -> torch.nn.Parameter:
    """A parameter of that matrix with the shape, dtype and device of `like`."""
    geometry = torch.empty(matrix.size, dtype=like.dtype, device="meta")
    device = torch.device("cpu") if like.is_meta else like.device
    remote = RemoteTensor(Stored(ParameterSource(matrix)), geometry, device=device)
    return torch.nn.Parameter(remote, requires_grad=requires_grad)
