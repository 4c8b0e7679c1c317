"""What a step asks of the optimizer, and the agreement of all members on it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import kt_expert_native as native

from kt_expert_server.adapters.tensor_sets import TensorSet, require_apart
from kt_expert_server.errors import InvalidRequest

_ADAM = ("adamw", "adam")  # one state serves both
_SCALE_TOLERANCE = 1e-3  # clip coefficients of two ranks may differ by their own rounding


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Hyper-parameters of some tensors; `numbers` are the named arguments of native.OptimizerUpdate."""

    sets: tuple[TensorSet, ...]
    kind: str
    numbers: tuple[tuple[str, float], ...]
    grad_scale: float
    new_optimizer: bool = False

    @property
    def state_kind(self) -> str:
        """The kind whose state the group needs: adam's is adamw's."""
        return _ADAM[0] if self.kind in _ADAM else self.kind

    def native(self) -> native.OptimizerUpdate:
        """Raises InvalidRequest for numbers the method is not defined for."""
        try:
            return native.OptimizerUpdate(self.kind, **dict(self.numbers))  # type: ignore[arg-type]  # nesterov is a bool
        except native.InvalidArgument as error:
            raise InvalidRequest(str(error)) from error


@dataclass(frozen=True, slots=True)
class StepParams:
    """What one member asks of a step. All members must ask the same, but for what each keeps."""

    groups: tuple[ParamGroup, ...]
    kept: tuple[TensorSet, ...] = ()

    def check(self) -> None:
        """Raises InvalidRequest for numbers without a meaning, or a tensor in two groups."""
        for group in self.groups:
            group.native()
        require_apart(each for group in self.groups for each in group.sets)


def agreed_params(by_rank: Mapping[int, StepParams]) -> StepParams:
    """The lowest rank's parameters, once all others are seen to be the same. Raises InvalidRequest."""
    first_rank = min(by_rank)
    first = by_rank[first_rank]
    for rank, other in by_rank.items():
        same = len(other.groups) == len(first.groups) and all(map(_same, first.groups, other.groups))
        if not same:
            raise InvalidRequest(f"rank {rank} asked for another step than rank {first_rank}: {other} against {first}")
    return first


def _same(ours: ParamGroup, theirs: ParamGroup) -> bool:
    fields = ("sets", "kind", "numbers", "new_optimizer")
    if any(getattr(ours, field) != getattr(theirs, field) for field in fields):
        return False
    if not (math.isfinite(ours.grad_scale) and math.isfinite(theirs.grad_scale)):
        return math.isfinite(ours.grad_scale) == math.isfinite(theirs.grad_scale)
    return abs(theirs.grad_scale - ours.grad_scale) <= _SCALE_TOLERANCE * abs(ours.grad_scale)
