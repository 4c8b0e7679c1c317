"""Ordinary memory for large results, used again once no tensor has it any more.

A result of 32 MiB in fresh memory costs 8,192 page faults, several times what filling it costs.
"""

from __future__ import annotations

import queue
import weakref

import numpy as np
import torch
from numpy.typing import NDArray

_LEAST_BYTES = 1024 * 1024  # below, malloc keeps it
_MOST_KEPT_BYTES = 256 * 1024 * 1024
_LEAST_FILL = 0.5  # a piece serves tensors of at least half its size


class RecycledMemory:
    """Used from one thread at a time; tensors may end on any."""

    def __init__(self) -> None:
        self._kept: list[NDArray[np.uint8]] = []  # the largest last
        # Tensors end in the middle of anything; this queue's put is safe even there.
        self._returned: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()

    def take(self, size_bytes: int) -> torch.Tensor:
        """uint8 [at least size_bytes]. Contents are whatever they were."""
        if size_bytes < _LEAST_BYTES:
            return torch.empty(size_bytes, dtype=torch.uint8)
        self._collect()
        fits = (index for index, each in enumerate(self._kept) if each.nbytes >= size_bytes >= each.nbytes * _LEAST_FILL)
        found = next(fits, None)
        piece = np.empty(size_bytes, np.uint8) if found is None else self._kept.pop(found)
        lent = piece.view()
        weakref.finalize(lent, self._returned.put, piece).atexit = False
        return torch.from_numpy(lent)

    def _collect(self) -> None:
        """What has come back, up to a bound; the smallest are let go of first."""
        while not self._returned.empty():
            self._kept.append(self._returned.get())
        self._kept.sort(key=lambda each: each.nbytes)
        while sum(each.nbytes for each in self._kept) > _MOST_KEPT_BYTES:
            del self._kept[0]
