"""Where the members of a run meet: for the gradient norm and for the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kt_expert_proto.header import Op

from kt_expert_server.adapters.step_params import StepParams
from kt_expert_server.errors import DeadlinePassed, ServerError
from kt_expert_server.members.replay_log import Entry


@dataclass(frozen=True, slots=True)
class Arrival:
    """One member's request. A patient one waits for members that have vanished, too."""

    entry: Entry
    op: Op
    text: str
    params: StepParams | None = None
    is_patient: bool = False


class Barrier:
    """Holds arrivals until all are there. What they came for is done by the owner, once for all.

    Who waits for the step has added up all its gradients, so others may ask for the norm meanwhile: that is what a trainer
    does that was started again between the two.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._arrivals: dict[int, Arrival] = {}

    @property
    def waiting(self) -> Mapping[int, Arrival]:
        return self._arrivals

    def arrive(self, rank: int, arrival: Arrival) -> None:
        assert rank not in self._arrivals, f"rank {rank} arrived twice"  # noqa: S101
        self._arrivals[rank] = arrival

    def complete(self) -> dict[int, Arrival] | None:
        """Once everybody is there, those who can be served, by rank: who asks for the norm, or everybody for the step."""
        if len(self._arrivals) < self._world_size:
            return None
        norms = [rank for rank, each in self._arrivals.items() if each.op is Op.GRAD_NORM]
        return {rank: self._arrivals.pop(rank) for rank in sorted(norms or self._arrivals)}

    def stepping(self) -> list[int]:
        """Ranks that wait for the others' step."""
        return sorted(rank for rank, each in self._arrivals.items() if each.op is Op.STEP)

    def impatient(self) -> list[int]:
        """Ranks that do not wait for members that have vanished."""
        return [rank for rank, each in self._arrivals.items() if not each.is_patient]

    def withdraw(self, rank: int) -> Arrival | None:
        return self._arrivals.pop(rank, None)

    def late(self, now: float) -> dict[int, ServerError]:
        """Ranks whose deadline has passed, with what to tell them. They are still there."""
        missing = sorted(set(range(self._world_size)) - set(self._arrivals))
        return {
            rank: DeadlinePassed(
                f"{each.text} waited {each.entry.deadline - each.entry.received_at:g} s for ranks {missing} of "
                f"{self._world_size}; nothing was applied. Are all members alive and at the same step?"
            )
            for rank, each in self._arrivals.items()
            if now >= each.entry.deadline
        }

    def next_deadline(self) -> float | None:
        return min((each.entry.deadline for each in self._arrivals.values()), default=None)
