"""LoRA of experts, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

PROJECTIONS = ("gate", "up", "down")
Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False, slots=True)
class ExpertMatrices:
    """Of one projection of one layer: expert e's weight gets scale * b[e] @ a[e] added. a is [E, r, in], b [E, out, r]."""

    a: Array
    b: Array
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])

    def apply(self, x: Array) -> Array:
        """What it adds to the projection's output for x [in], for each expert: [E, out]."""
        inner = np.einsum("eri,i->er", self.a, x)
        scaled: Array = np.multiply(np.einsum("eor,er->eo", self.b, inner), self.scale, dtype=np.float32)
        return scaled


Layers = dict[int, dict[str, ExpertMatrices]]  # by layer and projection


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader makes of an adapter: the experts' LoRA, keys of it that are dropped without a word, or why it refuses."""

    layers: Layers = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    refused: str = ""


def difference(ours: Layers, theirs: Mapping[int, Mapping[str, ExpertMatrices]]) -> list[str]:
    """Sentences about projections whose effect differs, on one random input each. A missing one adds nothing."""
    generator, found = np.random.default_rng(0), []
    for layer in sorted({*ours, *theirs}):
        for projection in PROJECTIONS:
            left, right = ours.get(layer, {}).get(projection), theirs.get(layer, {}).get(projection)
            known = left or right
            if known is None:
                continue
            x: Array = generator.standard_normal((known.a.shape[2],), np.float32)
            effects = [np.zeros(1, np.float32) if each is None else each.apply(x) for each in (left, right)]
            largest = max(float(np.abs(each).max()) for each in effects)
            apart = float(np.abs(effects[0] - effects[1]).max()) if largest else 0.0
            if apart > _TOLERANCE * largest:
                found.append(f"{projection} of layer {layer} differs by {apart / largest:.1e} of the largest")
    return found


_TOLERANCE = 1e-5  # sums of fp32 products in another order
