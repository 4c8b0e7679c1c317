"""Memory that both ends of a connection on one host see: who may write where, and until when.

A region has one writer. It gives out places of it, each under a number that never comes twice, and tells the reader where
a tensor lies; the reader says when it has done with a place. What each end knows of a region is in its own memory: nothing is
read from the region itself that decides about memory. Both classes are state machines without I/O.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from kt_expert_proto.header import FrameError

_PLACE = struct.Struct("<QQ")
PLACE_BYTES = _PLACE.size
GRANULE_BYTES = 4096  # places begin at pages, so that no two tensors share a cache line or a page


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in its region, and which of the tensors that ever lay there it is."""

    offset: int
    generation: int

    def pack(self) -> bytes:
        return _PLACE.pack(self.offset, self.generation)

    @classmethod
    def unpack(cls, payload: bytes | memoryview) -> Place:
        """Raises FrameError for another size."""
        if len(payload) != PLACE_BYTES:
            raise FrameError(f"a place in shared memory takes {PLACE_BYTES} bytes, got {len(payload)}")
        return cls(*_PLACE.unpack(payload))


@dataclass(slots=True)
class _Used:
    size: int
    generation: int = 0  # under which the reader has it; 0: it does not
    is_owned: bool = True  # somebody on this side needs it


class Allocator:
    """The writer's side of a region of `size_bytes`: first fit from the front, so that little of it is ever touched. Places get
    their generations in the order in which they are lent, which is that of the wire."""

    def __init__(self, size_bytes: int) -> None:
        self._free: list[tuple[int, int]] = [(0, size_bytes)]  # offset and size, ascending, no two adjacent
        self._used: dict[int, _Used] = {}  # by offset
        self._generation = 0

    @property
    def used_bytes(self) -> int:
        return sum(each.size for each in self._used.values())

    def take(self, size_bytes: int) -> int | None:
        """An offset, which is its taker's. None where no gap is large enough."""
        size = max(1, -(-size_bytes // GRANULE_BYTES)) * GRANULE_BYTES
        for index, (offset, free) in enumerate(self._free):
            if free >= size:
                self._free[index : index + 1] = [(offset + size, free - size)] if free > size else []
                self._used[offset] = _Used(size)
                return offset
        return None

    def lend(self, offset: int) -> Place | None:
        """The reader is to have it, until freed(). None where it has it already."""
        used = self._used[offset]
        if used.generation:
            return None
        self._generation += 1
        used.generation = self._generation
        return Place(offset, self._generation)

    def release(self, offset: int) -> None:
        """This side does not need it any more."""
        self._used[offset].is_owned = False
        self._reuse(offset)

    def freed(self, place: Place) -> None:
        """The reader has done with it. Raises FrameError for a place that it does not have, or had and gave back before."""
        used = self._used.get(place.offset)
        if used is None or not used.generation or used.generation != place.generation:
            raise FrameError(f"place {place.offset} of generation {place.generation} was given back and is not lent")
        used.generation = 0
        self._reuse(place.offset)

    def _reuse(self, offset: int) -> None:
        if self._used[offset].is_owned or self._used[offset].generation:
            return
        begin, end = offset, offset + self._used.pop(offset).size
        kept = []
        for other, free in self._free:
            if other + free == begin:
                begin = other
            elif other == end:
                end = other + free
            else:
                kept.append((other, free))
        self._free = sorted([*kept, (begin, end - begin)])


class Borrower:
    """The reader's side: which places it was shown and has not given back."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._held: dict[int, tuple[int, int]] = {}  # offset -> end and generation
        self._generation = 0

    @property
    def held_places(self) -> int:
        return len(self._held)

    def show(self, place: Place, size_bytes: int) -> None:
        """A tensor lies there. Raises FrameError for a place outside, one that is held still, or an older one."""
        begin, end = place.offset, place.offset + size_bytes
        if begin % GRANULE_BYTES or not size_bytes or end > self._size_bytes:
            raise FrameError(
                f"a tensor of {size_bytes} bytes at {begin} of shared memory; expected the begin of a page and an end up to "
                f"{self._size_bytes}"
            )
        if place.generation <= self._generation:
            raise FrameError(f"generation {place.generation} of shared memory came after {self._generation}")
        if any(begin < other_end and offset < end for offset, (other_end, _) in self._held.items()):
            raise FrameError(f"bytes {begin} to {end} of shared memory were shown and are still in use")
        self._generation = place.generation
        self._held[begin] = (end, place.generation)

    def release(self, place: Place) -> None:
        """It was shown, and is not read any more."""
        assert self._held[place.offset][1] == place.generation, place  # noqa: S101
        del self._held[place.offset]
