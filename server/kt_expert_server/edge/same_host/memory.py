"""The memory that one trainer and this server both see."""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from collections.abc import Callable

import numpy as np
from kt_expert_proto.handshake import NONCE_BYTES
from kt_expert_proto.header import Header
from kt_expert_proto.same_host import CONTROL_BYTES, SEALS
from kt_expert_proto.shared import Allocator, Borrower, Place
from numpy.typing import NDArray

from kt_expert_server.engine.buffers import BufferPool, PooledBuffer

_LEAST_SHARED_BYTES = 32 * 1024  # below, a tensor is sent quicker with its frame than by a place that has to be given back
Offer = Callable[[Header, PooledBuffer], PooledBuffer | None]


class SharedMemory:
    """A sealed file without a name, mapped here. `descriptor` is for the trainer; close() leaves the mapping to its users."""

    def __init__(self, region_bytes: int) -> None:
        """Raises OSError."""
        self.region_bytes = region_bytes
        size = CONTROL_BYTES + 2 * region_bytes
        self.descriptor = os.memfd_create("kt-expert", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
            mapped = mmap.mmap(self.descriptor, size)
        except OSError:
            os.close(self.descriptor)
            raise
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        mapped[:NONCE_BYTES] = self.nonce
        whole = np.frombuffer(mapped, np.uint8)
        self.incoming = whole[CONTROL_BYTES : CONTROL_BYTES + region_bytes]
        self.outgoing = whole[CONTROL_BYTES + region_bytes :]

    def close(self) -> None:
        os.close(self.descriptor)


class _Out(PooledBuffer):
    """A buffer in the region that the server writes."""

    def __init__(self, owner: SharedTensors, memory: NDArray[np.uint8], offset: int) -> None:
        super().__init__(_Returning(lambda: owner.taken_back(offset)), memory, memory.nbytes)
        self.owner, self.offset = owner, offset


class _Returning:
    """Implements Lender for one place."""

    def __init__(self, on_return: Callable[[], None]) -> None:
        self._on_return = on_return

    def give_back(self, memory: NDArray[np.uint8]) -> None:
        del memory
        self._on_return()


class SharedTensors:
    """Implements TensorMemory, and the part of ConnectionReceiver that is about memory. `on_free` tells the trainer that the
    server has done with a place."""

    def __init__(
        self, memory: SharedMemory, pool: BufferPool, on_free: Callable[[Place], None], least_bytes: int = _LEAST_SHARED_BYTES
    ) -> None:  # fmt: skip
        self._memory, self._pool, self._on_free = memory, pool, on_free
        self._least_bytes = least_bytes
        self._allocator, self._borrower = Allocator(memory.region_bytes), Borrower(memory.region_bytes)

    def take(self, size_bytes: int) -> PooledBuffer:
        offset = self._allocator.take(size_bytes) if size_bytes >= self._least_bytes else None
        if offset is None:
            return self._pool.take(size_bytes)
        return _Out(self, self._memory.outgoing[offset : offset + size_bytes], offset)

    def lend(self, buffer: PooledBuffer) -> Place | None:
        """The trainer is told where it lies. None where it has to be sent: it lies elsewhere, or was lent before."""
        return self._allocator.lend(buffer.offset) if isinstance(buffer, _Out) and buffer.owner is self else None

    def taken_back(self, offset: int) -> None:
        """The last holder here has released it."""
        self._allocator.release(offset)

    def freed(self, place: Place) -> None:
        """See ConnectionReceiver."""
        self._allocator.freed(place)

    def show(self, header: Header, place: Place, offer: Offer) -> PooledBuffer | None:
        """See ConnectionReceiver. `offer` says which buffer is to hold the tensor."""
        size = header.tensor_bytes
        self._borrower.show(place, size)
        memory = self._memory.incoming[place.offset : place.offset + size]
        there = PooledBuffer(_Returning(lambda: self._returned(place)), memory, size)
        taken: PooledBuffer | None = None
        try:
            taken = offer(header, there)
            if taken is not None and taken is not there:
                taken.view[:] = there.view
        finally:
            if taken is not there:
                there.release()
        return taken

    def _returned(self, place: Place) -> None:
        self._borrower.release(place)
        self._on_free(place)
