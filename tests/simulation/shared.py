"""Memory that both ends of a simulated connection see, as on one host: the product's own, small enough to be often full."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from kt_expert_client.wire.shared_memory import SharedMemory as TrainersMemory
from kt_expert_proto.codec import Outbound
from kt_expert_proto.header import FrameType, Header
from kt_expert_proto.shared import GRANULE_BYTES, Place
from kt_expert_server.edge.same_host.memory import SharedMemory, SharedTensors
from kt_expert_server.engine.buffers import BufferPool

_PLACES = 5  # of each direction; two calls in flight want as many
_LEAST_BYTES = 100  # hidden states are 192 bytes, ids and weights 24


class Shared:
    """Both sides of it. The server's comes with its stream."""

    def __init__(self) -> None:
        self._memory = SharedMemory(_PLACES * GRANULE_BYTES)
        self.trainer = TrainersMemory(os.dup(self._memory.descriptor), _LEAST_BYTES)
        self._memory.close()
        self.server: SharedTensors | None = None

    def serve(self, pool: BufferPool, on_free: Callable[[Place], None]) -> SharedTensors:
        self.server = SharedTensors(self._memory, pool, on_free, _LEAST_BYTES)
        return self.server

    def placed(self, frames: Iterable[Outbound]) -> Iterator[Outbound]:
        """A trainer's frames as they leave: with what it gives back, and tensors by their places."""
        for place in self.trainer.returned():
            yield Header(FrameType.FREE), place.pack()
        for header, payload in frames:
            if isinstance(payload, bytes | Place):
                yield header, payload
            else:
                yield header, self.trainer.put(payload.view()) or payload

    def check_given_back(self) -> None:
        """Once the server has nothing more to do, whether or not the connection is there."""
        if self.server is not None:
            assert not self.server._borrower.held_places, "the server still holds tensors of a trainer's memory"
            owned = [each for each in self.server._allocator._used.values() if each.is_owned]
            assert not owned, "results in shared memory are still the server's"
