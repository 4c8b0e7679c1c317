"""Messages into a byte stream and out of it, for transports over sockets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kt_expert_proto.codec import Decoder, Part
from kt_expert_proto.header import HEADER_BYTES, MAX_MESSAGE_BYTES, PREFIX_BYTES, message_bytes

_JOINED_BYTES = 64 * 1024  # a message up to this size is copied rather than sent in parts
_HEAD_BYTES = PREFIX_BYTES + HEADER_BYTES


class Messages:
    """Memory to receive into, then the messages that have become whole. Pieces that only go on with a tensor are received where
    they belong, and are no messages."""

    def __init__(self, decoder: Decoder[Any]) -> None:
        self._decoder = decoder
        self._memory = memoryview(bytearray(2 * MAX_MESSAGE_BYTES))
        self._begin = self._end = 0
        self._place = memoryview(b"")  # what is left of a piece's place in its tensor

    def room(self) -> memoryview:
        """Where the next bytes go."""
        if self._place:
            return self._place
        waiting = self._end - self._begin
        if self._decoder.goes_on and waiting < _HEAD_BYTES:  # what follows the head is most likely received elsewhere
            return self._memory[self._end : self._begin + _HEAD_BYTES]
        return self._memory[self._end :]

    def received(self, size_bytes: int) -> Iterator[memoryview]:
        """So many bytes have come; each message is valid until the next is asked for. Raises DamagedFrame for a length that no
        message has, and what a decoder raises."""
        if self._place:
            self._place = self._place[size_bytes:]
            if not self._place:
                self._decoder.filled()
            return
        self._end += size_bytes
        while self._end - self._begin >= PREFIX_BYTES:
            length = message_bytes(self._memory, self._begin)
            if self._end - self._begin < length:
                self._find_place(length)
                break
            self._begin += length
            yield self._memory[self._begin - length : self._begin]
        rest = self._end - self._begin
        if self._begin and (rest == 0 or len(self._memory) - self._end < MAX_MESSAGE_BYTES):
            self._memory[:rest] = self._memory[self._begin : self._end]
            self._begin, self._end = 0, rest

    def _find_place(self, length: int) -> None:
        """For the payload of a message that has begun to come, if it is one piece."""
        payload = self._begin + _HEAD_BYTES
        if self._end < payload:
            return
        place = self._decoder.place_for(self._memory[payload - HEADER_BYTES : payload], length - _HEAD_BYTES)
        if place is None:
            return
        come = self._end - payload
        place[:come] = self._memory[payload : self._end]
        self._place = place[come:]
        self._begin = self._end = 0


def joined(parts: list[Part]) -> list[Part]:
    """A message's parts as they are best sent."""
    return [b"".join(parts)] if sum(map(len, parts)) <= _JOINED_BYTES else parts


def rest_of(parts: list[Part], sent: int) -> list[Part]:
    """What is left after so many bytes."""
    for index, part in enumerate(parts):
        if sent < len(part):
            return [memoryview(part)[sent:], *parts[index + 1 :]]
        sent -= len(part)
    return []
