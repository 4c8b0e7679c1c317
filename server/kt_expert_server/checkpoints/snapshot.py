"""A copy of a run's state in memory, taken between two operations of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.adapters.run_config import RunConfig
from kt_expert_server.adapters.transfer import TensorId, all_tensors
from kt_expert_server.checkpoints.manifest import AdapterRecord, MemberMark

Tensors = list[tuple[TensorId, NDArray[np.float32]]]


@dataclass(frozen=True, slots=True)
class SnapshotAbout:
    """All of a snapshot but its tensors; the fields are the manifest's."""

    name: str
    run: str
    owner: str
    model_digest: str
    step: int
    writes: dict[str, int]
    sequence: int
    automatic: bool
    restart_point: bool
    members: dict[str, MemberMark]
    author: MemberMark | None
    config: RunConfig
    adapters: tuple[AdapterRecord, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    about: SnapshotAbout
    tensors: Tensors


def copy_tensors(adapters: Mapping[str, Adapter]) -> Tensors:
    """Parameters and moments in fp32, by adapter and layer. Takes snapshot_bytes()."""
    return [(tensor, live.copy()) for tensor, live in all_tensors(adapters, parameters=True, moments=True)]


def snapshot_bytes(adapters: Mapping[str, Adapter]) -> int:
    """What copy_tensors() and writing its largest layer take together."""
    sizes: dict[tuple[str, int], int] = {}
    for tensor, live in all_tensors(adapters, parameters=True, moments=True):
        place = (tensor.adapter, tensor.layer)
        sizes[place] = sizes.get(place, 0) + live.nbytes
    return sum(sizes.values()) + max(sizes.values(), default=0)
