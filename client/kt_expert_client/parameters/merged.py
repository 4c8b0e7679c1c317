"""LoRA that PEFT has merged into weights: a snapshot of its adapter, which forwards add to the base weights as before. So the
sum is as exact as with LoRA apart, it takes no copy of the weights, and taking it out again leaves nothing behind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kt_expert_proto.lora import PARAMETER

from kt_expert_client.parameters.lora import LoraMatrix
from kt_expert_client.parameters.matrix import A, B, Place


@dataclass(frozen=True, eq=False, slots=True)
class Merged:
    """scale times the product of two matrices of a snapshot, for each expert."""

    a: LoraMatrix
    b: LoraMatrix
    scale: float
    is_b_first: bool  # else A^T B^T, where weights are [E, in, out]

    @property
    def key(self) -> tuple[Place, Place, bool]:
        """What two of them need in common to be one with the sum of their scales."""
        return self.a.place, self.b.place, self.is_b_first

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Merged) and (self.key, self.scale) == (other.key, other.scale)

    def __hash__(self) -> int:
        return hash((self.key, self.scale))

    def read(self) -> torch.Tensor:
        """In the layout of the weights, fp32."""
        a, b = self.a.read_by_expert(PARAMETER), self.b.read_by_expert(PARAMETER)
        product = torch.bmm(b, a) if self.is_b_first else torch.bmm(a.transpose(1, 2), b.transpose(1, 2))
        return product * self.scale


def snapshot(a: LoraMatrix, b: LoraMatrix, scale: float, *, is_b_first: bool) -> Merged:
    """Of what the adapter holds now."""
    name = a.store.snapshot(a.place.adapter)

    def frozen(matrix: LoraMatrix, side: str) -> LoraMatrix:
        place = Place(name, matrix.place.layer, matrix.place.target, side)
        return matrix.store.hold(LoraMatrix(matrix.store, place, matrix.shape))

    return Merged(frozen(a, A), frozen(b, B), scale, is_b_first)


def with_added(merged: tuple[Merged, ...], more: Merged) -> tuple[Merged, ...]:
    """The same snapshot twice is one with both scales; with none left, it is out."""
    scale = more.scale + sum(each.scale for each in merged if each.key == more.key)
    others = tuple(each for each in merged if each.key != more.key)
    return (*others, Merged(more.a, more.b, scale, more.is_b_first)) if scale else others
