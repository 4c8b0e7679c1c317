"""Which member of which run this process is."""

from __future__ import annotations

import os
import re
import uuid
from dataclasses import dataclass

import torch

RUN_VARIABLE = "KT_EXPERT_RUN"
_FORBIDDEN = re.compile(r"[^A-Za-z0-9._-]")
_NAME_BYTES = 32


@dataclass(frozen=True, slots=True)
class Membership:
    """`name` None: an anonymous run of one member. `ephemeral`: the run ends with its members."""

    name: str | None
    rank: int
    world_size: int
    ephemeral: bool


ALONE = Membership(None, 0, 1, ephemeral=True)


def current_membership() -> Membership:
    """From KT_EXPERT_RUN, torch.distributed, or the launcher's RANK and WORLD_SIZE, in that order of trust.

    Under torch.distributed this is a collective: every rank calls it, and equally often.
    """
    named = os.environ.get(RUN_VARIABLE) or None
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed:
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    else:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if named is not None or world_size == 1:
        return Membership(named, rank, world_size, ephemeral=named is None)
    return Membership(_shared_name() if distributed else _launcher_name(), rank, world_size, ephemeral=True)


def _shared_name() -> str:
    """A name rank 0 invents and broadcasts as bytes."""
    raw = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
    if torch.distributed.get_rank() == 0:
        raw = torch.frombuffer(bytearray(uuid.uuid4().hex.encode("ascii")), dtype=torch.uint8).clone()
    if torch.distributed.get_backend() == "nccl":
        raw = raw.cuda()
    torch.distributed.broadcast(raw, src=0)
    return "ddp-" + bytes(raw.cpu().tolist()).decode("ascii")


def _launcher_name() -> str:
    """What torchrun gives every rank alike, before torch.distributed is initialised."""
    parts = [os.environ.get(key, "") for key in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")]
    parts.append(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return _FORBIDDEN.sub("-", "torchrun-" + "-".join(parts))[:128]
