"""Reserving what the training of an adapter takes."""

from __future__ import annotations

from collections.abc import Callable

from kt_expert_server.adapters.sizes import TrainingBytes
from kt_expert_server.engine.budget import Reservation
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import ServerError

Reserve = Callable[[Kind, int, str, str], Reservation]  # kind, bytes, owner, what for


def reserve_training(reserve: Reserve, needed: TrainingBytes, owner: str, adapter: str) -> list[Reservation]:
    """All of it or nothing. Raises OutOfCapacity."""
    return reserve_all(reserve, training_sizes(needed), owner, adapter)


def training_sizes(needed: TrainingBytes) -> dict[Kind, int]:
    return {Kind.GRADIENTS: needed.gradients, Kind.OPTIMIZER: needed.optimizer, Kind.SCRATCH: needed.scratch}


def reserve_all(reserve: Reserve, sizes: dict[Kind, int], owner: str, adapter: str) -> list[Reservation]:
    """All of it or nothing. Raises OutOfCapacity."""
    held: list[Reservation] = []
    try:
        for kind, size in sizes.items():
            held.append(reserve(kind, size, owner, f"run {owner!r}: the {kind} of adapter {adapter!r}"))
    except ServerError:
        for each in held:
            each.release()
        raise
    return held
