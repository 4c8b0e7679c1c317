"""The memory that this trainer and a server on its host both see."""

from __future__ import annotations

import mmap
import os
import queue
import threading
import weakref

import numpy as np
import torch
from kt_expert_proto.handshake import NONCE_BYTES
from kt_expert_proto.header import FrameError, Header
from kt_expert_proto.same_host import CONTROL_BYTES, region_bytes
from kt_expert_proto.shared import Allocator, Borrower, Place

_LEAST_SHARED_BYTES = 32 * 1024  # below, a tensor is sent quicker with its frame


class LentBuffer:
    """A received tensor where the server has put it. Implements Buffer. The server gets the place back once nobody has the
    tensor any more: its memory is the tensor's."""

    def __init__(self, memory: torch.Tensor, size_bytes: int) -> None:
        self._memory: torch.Tensor | None = memory
        self._size_bytes = size_bytes

    @property
    def view(self) -> memoryview:
        assert self._memory is not None  # noqa: S101  # nobody uses what was released
        view: memoryview = self._memory.numpy().data
        return view

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, not copied."""
        assert self._memory is not None  # noqa: S101
        return self._memory.view(dtype).view(shape)

    def release(self) -> None:
        self._memory = None


class SharedMemory:
    """The mapping, and what this side knows of its two regions."""

    def __init__(self, descriptor: int, least_bytes: int = _LEAST_SHARED_BYTES) -> None:
        """Takes the descriptor. Raises ValueError for memory that is not sealed, OSError."""
        try:
            size = region_bytes(descriptor)
            mapped = mmap.mmap(descriptor, CONTROL_BYTES + 2 * size)
        finally:
            os.close(descriptor)
        self._least_bytes = least_bytes
        self.nonce = bytes(mapped[:NONCE_BYTES])
        whole = np.frombuffer(mapped, np.uint8)
        self._outgoing, self._incoming = whole[CONTROL_BYTES : CONTROL_BYTES + size], whole[CONTROL_BYTES + size :]
        self._allocator, self._borrower = Allocator(size), Borrower(size)
        self._lock = threading.Lock()
        # Tensors end in the middle of anything; this queue's put is safe even there.
        self._returned: queue.SimpleQueue[Place] = queue.SimpleQueue()

    def put(self, content: memoryview) -> Place | None:
        """Copies a tensor to where the server sees it. None for one that is to be sent: it is small, or there is no room."""
        size = len(content)
        if size < self._least_bytes:
            return None
        with self._lock:
            offset = self._allocator.take(size)
        if offset is None:
            return None
        np.copyto(self._outgoing[offset : offset + size], np.frombuffer(content, np.uint8))
        with self._lock:
            place = self._allocator.lend(offset)
            self._allocator.release(offset)
        return place

    def freed(self, place: Place) -> None:
        """See ConnectionReceiver."""
        with self._lock:
            self._allocator.freed(place)

    def show(self, header: Header, place: Place) -> LentBuffer:
        """See ConnectionReceiver."""
        size = header.tensor_bytes
        if size < self._least_bytes:
            raise FrameError(f"a tensor of {size} bytes came through shared memory, expected at least {self._least_bytes}")
        with self._lock:
            self._borrower.show(place, size)
        memory = self._incoming[place.offset : place.offset + size].view()
        weakref.finalize(memory, self._returned.put, place).atexit = False
        with torch.inference_mode(mode=False):
            return LentBuffer(torch.from_numpy(memory), size)

    def returned(self) -> list[Place]:
        """Places of the server's that nobody here reads any more, since the last call."""
        found: list[Place] = []
        while True:
            try:
                place = self._returned.get_nowait()
            except queue.Empty:
                return found
            with self._lock:
                self._borrower.release(place)
            found.append(place)
