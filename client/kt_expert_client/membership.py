"""Which member of which run this process is."""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass

import torch

from kt_expert_client.waiting import wait_until

RUN_VARIABLE = "KT_EXPERT_RUN"
_FORBIDDEN = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, slots=True)
class Membership:
    """`name` None: an anonymous run of one member. `ephemeral`: the run ends with its members."""

    name: str | None
    rank: int
    world_size: int
    ephemeral: bool


ALONE = Membership(None, 0, 1, ephemeral=True)


def current_membership(number: int) -> Membership:
    """From KT_EXPERT_RUN, torch.distributed, or the launcher's RANK and WORLD_SIZE, in that order of trust.

    `number` says which of this process's models asks: it is the same on every rank, since they connect the same models in the
    same order. A model that one rank alone has is connected with RunOptions(alone=True). Nothing here is a collective: rank 0
    waits for nobody, and other ranks for rank 0's name of the run.
    """
    named = os.environ.get(RUN_VARIABLE) or None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if named is not None or world_size == 1:
        return Membership(named, rank, world_size, ephemeral=named is None)
    return Membership(_shared_name(rank, number) if distributed else _launcher_name(number), rank, world_size, ephemeral=True)


def _shared_name(rank: int, number: int) -> str:
    """A name that rank 0 invents and leaves where torch.distributed's ranks met. Raises DeadlineExceeded."""
    store, key = torch.distributed.distributed_c10d._get_default_store(), f"kt-expert-run-{number}"
    if rank == 0:
        store.set(key, f"ddp-{uuid.uuid4().hex}")
    wait_until(
        lambda: bool(store.check([key])),
        lambda: (
            f"for rank 0 to use its model number {number}, as rank {rank} does now. Does rank 0 connect the same models in the "
            "same order? A model that one rank alone has is connected with RunOptions(alone=True)"
        ),
    )
    return str(store.get(key).decode("ascii"))


def _launcher_name(number: int) -> str:
    """What torchrun gives every rank alike, before torch.distributed is initialised."""
    parts = [os.environ.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    parts += [os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), str(number)]
    return _FORBIDDEN.sub("-", "torchrun-" + "-".join(parts))[:128]
