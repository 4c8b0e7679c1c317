"""Memory that tensors are received into and computed into, kept for reuse.

A fresh buffer of 32 MiB costs 8,192 page faults, several times what filling it costs; so buffers that are given back serve the
next tensor of about their size.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import numpy as np
from kt_expert_proto.dtypes import ITEM_BYTES, NUMPY_NAMES, Dtype
from numpy.typing import NDArray

_ALIGNMENT = 64  # bytes: a cache line, and what vector loads like best
_LEAST_KEPT_BYTES = 4096  # below, allocating is as cheap as looking for one
_LEAST_FILL = 0.5  # a buffer serves tensors of at least half its size, so that little is wasted
MAX_KEPT_BYTES = 1 << 30


class TensorMemory(Protocol):
    """Where tensors are put."""

    def take(self, size_bytes: int) -> PooledBuffer:
        """The caller has reserved the bytes. Contents are whatever they were."""


class Lender(Protocol):
    """Whose memory a buffer is."""

    def give_back(self, memory: NDArray[np.uint8]) -> None: ...


class PooledBuffer:
    """Implements the codec's Buffer. Released once by each of its holders; using it afterwards is a fault of ours."""

    def __init__(self, pool: Lender, memory: NDArray[np.uint8], size_bytes: int) -> None:
        self._pool = pool
        self._memory: NDArray[np.uint8] | None = memory
        self._size_bytes = size_bytes
        self._holders = 1

    def hold(self) -> None:
        """One more holder: the memory serves nobody else until all have released it."""
        assert self._memory is not None, "a released buffer was held"  # noqa: S101
        self._holders += 1

    @property
    def is_shared(self) -> bool:
        """Somebody beside its owner still holds it."""
        return self._holders > 1

    @property
    def view(self) -> memoryview:
        assert self._memory is not None, "a released buffer was used"  # noqa: S101
        return self._memory.data[: self._size_bytes]

    def array(self, dtype: Dtype, rows: int, columns: int) -> NDArray[Any]:
        """The tensor, not copied. Not to be used after the release."""
        assert self._memory is not None, "a released buffer was used"  # noqa: S101
        size = rows * columns * ITEM_BYTES[dtype]
        assert size <= self._size_bytes, (size, self._size_bytes)  # noqa: S101
        return self._memory[:size].view(NUMPY_NAMES[dtype]).reshape(rows, columns)

    def release(self) -> None:
        assert self._memory is not None, "a buffer was released twice"  # noqa: S101
        self._holders -= 1
        if self._holders:
            return
        memory, self._memory = self._memory, None
        self._pool.give_back(memory)


class BufferPool:
    """Any thread may take and give back. What is kept counts as memory of kind `kept` and gives way to reservations."""

    def __init__(self, max_kept_bytes: int = MAX_KEPT_BYTES) -> None:
        self._max_kept_bytes = max_kept_bytes
        self._lock = threading.Lock()
        self._free: list[NDArray[np.uint8]] = []
        self._kept_bytes = 0

    def take(self, size_bytes: int) -> PooledBuffer:
        """The caller has reserved the bytes. Contents are whatever they were."""
        with self._lock:
            best: int | None = None
            for index, memory in enumerate(self._free):
                fits = memory.nbytes >= size_bytes >= memory.nbytes * _LEAST_FILL
                if fits and (best is None or memory.nbytes < self._free[best].nbytes):
                    best = index
            if best is not None:
                memory = self._free.pop(best)
                self._kept_bytes -= memory.nbytes
                return PooledBuffer(self, memory, size_bytes)
        return PooledBuffer(self, _aligned(size_bytes), size_bytes)

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    def drop_kept(self) -> None:
        with self._lock:
            dropped, self._free, self._kept_bytes = self._free, [], 0
        del dropped  # unmapped outside the lock

    def give_back(self, memory: NDArray[np.uint8]) -> None:
        if memory.nbytes < _LEAST_KEPT_BYTES:
            return
        with self._lock:
            if self._kept_bytes + memory.nbytes <= self._max_kept_bytes:
                self._free.append(memory)
                self._kept_bytes += memory.nbytes


def _aligned(size_bytes: int) -> NDArray[np.uint8]:
    raw = np.empty(size_bytes + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + size_bytes]
