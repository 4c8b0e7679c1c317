"""What a step asks of the optimizer, and the agreement of all members on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import kt_expert_native as native
from kt_expert_proto.lora import TENSORS

from kt_expert_server.errors import InvalidRequest

_ADAM = ("adamw", "adam")  # one state serves both
_SCALE_TOLERANCE = 1e-3  # clip coefficients of two ranks may differ by their own rounding


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Hyper-parameters of some tensors; `numbers` are the named arguments of native.OptimizerUpdate."""

    tensors: tuple[str, ...]  # empty: all that no other group names
    kind: str
    numbers: tuple[tuple[str, float], ...]

    def native(self) -> native.OptimizerUpdate:
        """Raises InvalidRequest for numbers the method is not defined for."""
        try:
            return native.OptimizerUpdate(self.kind, **dict(self.numbers))  # type: ignore[arg-type]  # nesterov is a bool
        except native.InvalidArgument as error:
            raise InvalidRequest(str(error)) from error


@dataclass(frozen=True, slots=True)
class StepParams:
    """What one member asks of a step. All members must ask the same."""

    groups: tuple[ParamGroup, ...]
    grad_scale: float
    new_optimizer: bool = False

    @property
    def state_kind(self) -> str:
        """The kind whose state the step needs: adam's is adamw's."""
        return _state_kind(self.groups[0].kind)

    def updates(self) -> dict[str, native.OptimizerUpdate]:
        """By tensor. Raises InvalidRequest where a tensor has no group or two, or groups are of different kinds."""
        found: dict[str, native.OptimizerUpdate] = {}
        rest: native.OptimizerUpdate | None = None
        for group in self.groups:
            if _state_kind(group.kind) != self.state_kind:
                raise InvalidRequest(f"a step mixes {self.groups[0].kind} and {group.kind}; use one for all groups")
            update = group.native()
            if not group.tensors:
                if rest is not None:
                    raise InvalidRequest("two groups of a step name no tensors; one may stand for all others")
                rest = update
            for tensor in group.tensors:
                if tensor not in TENSORS or tensor in found:
                    raise InvalidRequest(f"a step names tensor {tensor!r} twice, or it is none of {', '.join(TENSORS)}")
                found[tensor] = update
        missing = [tensor for tensor in TENSORS if tensor not in found]
        if missing and rest is None:
            raise InvalidRequest(f"no group of the step holds {', '.join(missing)}; one group without names covers the rest")
        if rest is not None:
            found.update(dict.fromkeys(missing, rest))
        return found


def _state_kind(kind: str) -> str:
    return _ADAM[0] if kind in _ADAM else kind


def agreed_params(by_rank: Mapping[int, StepParams]) -> StepParams:
    """The lowest rank's parameters, once all others are seen to be the same. Raises InvalidRequest."""
    first_rank = min(by_rank)
    first = by_rank[first_rank]
    for rank, other in by_rank.items():
        differs = abs(other.grad_scale - first.grad_scale) > _SCALE_TOLERANCE * abs(first.grad_scale)
        if (other.groups, other.new_optimizer) != (first.groups, first.new_optimizer) or differs:
            raise InvalidRequest(f"rank {rank} asked for another step than rank {first_rank}: {other} against {first}")
    return first
