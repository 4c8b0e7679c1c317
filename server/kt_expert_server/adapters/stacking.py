"""Several adapters on one layer at once: their tensors side by side as those of one.

The sum of s_i B_i A_i is B A where A holds the rows of all A_i, and B the columns of all s_i B_i. The gradients of A_i are
rows of A's, those of B_i are s_i times columns of B's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import kt_expert_native as native
import numpy as np
from kt_expert_proto.lora import TENSORS
from numpy.typing import NDArray

from kt_expert_server.adapters.adapter import AdapterLayer
from kt_expert_server.errors import InvalidRequest

Scales = tuple[float, float, float]  # of gate, up and down


@dataclass(frozen=True, slots=True)
class Active:
    """A layer of an adapter with the scales that a request gives it."""

    layer: AdapterLayer
    scales: Scales


def stacked_spec(active: Sequence[Active]) -> native.AdapterSpec:
    """Of all together. Raises InvalidRequest for adapters of different dropouts."""
    loras = [each.layer.lora for each in active]
    dropouts = {lora.dropout for lora in loras}
    if len(dropouts) > 1:
        raise InvalidRequest(f"adapters with dropouts {sorted(dropouts)} are active together; they need the same one")
    ranks = {name: sum(getattr(lora, name) for lora in loras) for name in ("rank_gate", "rank_up", "rank_down")}
    return native.AdapterSpec(
        tied=_is_tied(active), scale_gate=1.0, scale_up=1.0, scale_down=1.0, dropout=dropouts.pop(), **ranks
    )


def stack(active: Sequence[Active], into: native.AdapterTensors) -> None:
    """Fills tensors that were made for stacked_spec()."""
    for name in into.names():
        for each, place in _places(active, name):
            source = _source(each, name)
            values = each.layer.parameters.tensor(source)
            _part(into.tensor(name), name, place)[...] = values if _is_a(name) else values * np.float32(_scale(each, name))


def add_gradients(
    active: Sequence[Active], stacked: native.AdapterTensors, index: int, into: native.AdapterTensors, wanted: Sequence[str],
    replaced: Sequence[str],
) -> None:  # fmt: skip
    """Those of the adapter at `index`, added to what `into` holds, or in its place."""
    for name in replaced:
        into.tensor(name)[...] = 0.0
    for name in stacked.names():
        for each, place in _places(active, name):
            source = _source(each, name)
            if each is active[index] and source in wanted:
                values = _part(stacked.tensor(name), name, place)
                into.tensor(source)[...] += values if _is_a(name) else values * np.float32(_scale(each, name))


def _is_tied(active: Sequence[Active]) -> bool:
    return all(each.layer.lora.tied or not (each.layer.lora.rank_gate or each.layer.lora.rank_up) for each in active)


def _is_a(name: str) -> bool:
    return name.startswith("a_")


def _source(active: Active, name: str) -> str:
    """Where tied, what plays A for up is A of gate."""
    return "a_gate" if name == "a_up" and active.layer.lora.tied else name


def _scale(active: Active, name: str) -> float:
    return active.scales[TENSORS.index(name) // 2]


def _places(active: Sequence[Active], name: str) -> list[tuple[Active, slice]]:
    """Which ranks of the stacked tensor are whose."""
    found, first = [], 0
    for each in active:
        rank = getattr(each.layer.lora, "rank_" + name.split("_")[1])
        if rank:
            found.append((each, slice(first, first + rank)))
        first += rank
    return found


def _part(tensor: NDArray[np.float32], name: str, place: slice) -> NDArray[np.float32]:
    return tensor[:, place, :] if _is_a(name) else tensor[:, :, place]
