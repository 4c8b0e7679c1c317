"""Frames to messages and back, for every transport.

A message is its own length and one piece or several whole ones, at most MAX_MESSAGE_BYTES together: a small request then costs
one message each way. What a session sees are whole frames: a header, and a payload that is either the bytes of a
protobuf message or a buffer that holds a whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from kt_expert_proto.header import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX,
    DamagedFrame,
    FrameError,
    FrameType,
    Header,
    Piece,
    pack,
    unpack,
)


class Buffer(Protocol):
    """Memory for one tensor. Whoever was handed it releases it, once, when nothing reads it any more."""

    @property
    def view(self) -> memoryview:
        """Its bytes, writable, one dimension, as long as the tensor."""

    def release(self) -> None:
        """Gives the memory back."""


class Source(Protocol):
    """A tensor to be sent. `view` may wait, for a copy from a device; it is called when the tensor's turn comes."""

    def view(self) -> memoryview:
        """Its bytes, one dimension. They must not change until the session that sent them lets go of the source."""


B = TypeVar("B", bound=Buffer)
Outbound = tuple[Header, "bytes | Source"]  # bytes for a protobuf message, a source for a tensor


@dataclass(frozen=True, slots=True)
class Memory:
    """A source that is ready: memory somebody else holds."""

    content: memoryview

    def view(self) -> memoryview:
        return self.content


class Encoder:
    """Cuts and numbers the frames of one direction of one stream."""

    def __init__(self, *, checksum: bool = True, piece_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self._checksum = checksum
        self._piece_bytes = piece_bytes
        self._message_bytes = PREFIX.size + HEADER_BYTES + piece_bytes
        self._sequence = 0

    def messages(self, frames: Iterable[Outbound]) -> Iterator[bytes]:
        """Messages that carry `frames` in order: small neighbours travel together, large ones cost one copy."""
        waiting: list[bytes | memoryview] = [b""]
        size = PREFIX.size
        for header, payload in frames:
            for packed, piece in self._pieces(header, payload):
                if size > PREFIX.size and size + HEADER_BYTES + len(piece) > self._message_bytes:
                    yield _joined(waiting, size)
                    waiting, size = [b""], PREFIX.size
                waiting += (packed, piece)
                size += HEADER_BYTES + len(piece)
        if size > PREFIX.size:
            yield _joined(waiting, size)

    def _pieces(self, header: Header, payload: bytes | Source) -> Iterator[tuple[bytes, bytes | memoryview]]:
        content = payload if isinstance(payload, bytes) else payload.view()
        if isinstance(payload, bytes) and len(payload) > MAX_PAYLOAD_BYTES:
            raise FrameError(f"{header.type.name} message of {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} fit a frame")
        # A protobuf message is never cut; a longer one than a piece makes a longer message.
        step = max(1, len(content)) if isinstance(payload, bytes) else self._piece_bytes
        for offset in range(0, max(1, len(content)), step):
            piece = content[offset : offset + step]
            yield pack(header, self._sequence, offset, piece, checksum=self._checksum), piece
            self._sequence = (self._sequence + 1) & 0xFFFFFFFF


def _joined(parts: list[bytes | memoryview], size: int) -> bytes:
    """The message; `parts` begins with room for its length."""
    parts[0] = PREFIX.pack(size)
    return b"".join(parts)


class FrameReceiver(Protocol[B]):
    """What a decoder delivers to. Called in the order of the wire, from whoever feeds the decoder."""

    def admit(self, header: Header) -> B | None:
        """A tensor of header.tensor_bytes is about to come: memory for it, or None to skip it. Raises FrameError for one
        that must not come now."""

    def deliver(self, header: Header, payload: bytes | B) -> None:
        """A whole frame. A buffer is the receiver's from here on."""


@dataclass(slots=True)
class _Partial(Generic[B]):
    header: Header
    buffer: B | None  # None: its bytes are skipped
    filled: int = 0


class Decoder(Generic[B]):
    """Checks and joins the pieces of one direction of one stream."""

    def __init__(self, receiver: FrameReceiver[B]) -> None:
        self._receiver = receiver
        self._sequence = 0
        self._partial: _Partial[B] | None = None

    def feed(self, message: bytes) -> None:
        """Takes one message off the wire. Raises FrameError for what may not come, DamagedFrame for what is not as it was sent;
        the stream is then of no more use."""
        least = PREFIX.size + HEADER_BYTES
        if not least <= len(message) <= MAX_MESSAGE_BYTES or PREFIX.unpack_from(message)[0] != len(message):
            raise DamagedFrame(
                f"message of {len(message)} bytes, expected {least} to {MAX_MESSAGE_BYTES} and what it announces"
            )
        view, position = memoryview(message), PREFIX.size
        while position < len(message):
            piece = unpack(view, position)
            position += HEADER_BYTES + len(piece.payload)
            if piece.sequence != self._sequence:
                raise DamagedFrame(f"piece {piece.sequence} came, expected {self._sequence}: lost, repeated or reordered")
            self._sequence = (self._sequence + 1) & 0xFFFFFFFF
            self._take(piece)

    def close(self) -> None:
        """The stream has ended: what is half received is given back."""
        partial, self._partial = self._partial, None
        if partial is not None and partial.buffer is not None:
            partial.buffer.release()

    def _take(self, piece: Piece) -> None:
        if piece.header.type is not FrameType.TENSOR:
            if self._partial is not None:
                raise FrameError(
                    f"{piece.header.type.name} came after {self._partial.filled} of {self._partial.header.tensor_bytes} bytes "
                    f"of {self._partial.header.tensor.name}"
                )
            if piece.offset:
                raise FrameError(f"{piece.header.type.name} begins at offset {piece.offset}; only tensors are cut")
            self._receiver.deliver(piece.header, bytes(piece.payload))
            return
        partial = self._partial
        if partial is None:
            partial = self._partial = _Partial(piece.header, self._receiver.admit(piece.header))
        self._fill(partial, piece)

    def _fill(self, partial: _Partial[B], piece: Piece) -> None:
        total, end = partial.header.tensor_bytes, piece.offset + len(piece.payload)
        is_next = (piece.header is partial.header or piece.header == partial.header) and piece.offset == partial.filled
        if not is_next or end > total or (end < total and not piece.payload):
            raise FrameError(
                f"tensor {piece.header.tensor.name} of request {piece.header.request_id}: bytes {piece.offset} to {end} came, "
                f"expected {partial.header.tensor.name} of request {partial.header.request_id} to go on at {partial.filled} of "
                f"{total}"
            )
        if partial.buffer is not None:
            partial.buffer.view[piece.offset : end] = piece.payload
        partial.filled = end
        if end == total:
            self._partial = None
            if partial.buffer is not None:
                self._receiver.deliver(partial.header, partial.buffer)
