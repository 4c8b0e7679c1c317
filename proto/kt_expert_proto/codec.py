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
    PREFIX_BYTES,
    DamagedFrame,
    FrameError,
    FrameType,
    Header,
    Piece,
    check_piece,
    is_piece,
    message_bytes,
    pack,
    pack_prefix,
    unpack,
)
from kt_expert_proto.shared import Place


class Buffer(Protocol):
    """Memory for one tensor. Whoever was handed it releases it, once, when nothing reads it any more."""

    @property
    def view(self) -> memoryview:
        """Its bytes, writable, one dimension, as long as the tensor."""

    def release(self) -> None:
        """Gives the memory back."""


class Source(Protocol):
    """A tensor to be sent. `view` may wait, for a copy from a device; it is called when the tensor's turn comes."""

    @property
    def is_ready(self) -> bool:
        """Whether `view` would not wait."""

    def view(self) -> memoryview:
        """Its bytes, one dimension. They must not change until the session that sent them lets go of the source."""


B = TypeVar("B", bound=Buffer)
B_co = TypeVar("B_co", bound=Buffer, covariant=True)
# Bytes for a protobuf message; for a tensor a source, or its place in memory that the other end sees.
Outbound = tuple[Header, "bytes | Source | Place"]
Part = bytes | memoryview  # of a message


@dataclass(frozen=True, slots=True)
class Memory:
    """A source that is ready: memory somebody else holds."""

    content: memoryview
    is_ready: bool = True

    def view(self) -> memoryview:
        return self.content


class Encoder:
    """Cuts and numbers the frames of one direction of one stream."""

    def __init__(self, *, checksum: bool = True, piece_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self._checksum = checksum
        self._piece_bytes = piece_bytes
        self._message_bytes = PREFIX_BYTES + HEADER_BYTES + piece_bytes
        self._sequence = 0

    def messages(self, frames: Iterable[Outbound]) -> Iterator[bytes]:
        """Messages that carry `frames` in order: small neighbours travel together, large ones cost one copy."""
        return (b"".join(parts) for parts in self.gathered(frames))

    def gathered(self, frames: Iterable[Outbound]) -> Iterator[list[Part]]:
        """The same messages, each as the parts it is made of, which are not copied: a source is read until the message that
        has the last of it is sent."""
        waiting: list[Part] = [b""]
        size = PREFIX_BYTES
        for header, payload in frames:
            for packed, piece in self._pieces(header, payload):
                if size > PREFIX_BYTES and size + HEADER_BYTES + len(piece) > self._message_bytes:
                    yield _with_length(waiting, size)
                    waiting, size = [b""], PREFIX_BYTES
                waiting += (packed, piece)
                size += HEADER_BYTES + len(piece)
        if size > PREFIX_BYTES:
            yield _with_length(waiting, size)

    def _pieces(self, header: Header, payload: bytes | Source | Place) -> Iterator[tuple[bytes, Part]]:
        if isinstance(payload, Place):
            place = payload.pack()
            yield pack(header, self._next(), 0, place, checksum=self._checksum, shared=True), place
            return
        content = payload if isinstance(payload, bytes) else payload.view()
        if isinstance(payload, bytes) and len(payload) > MAX_PAYLOAD_BYTES:
            raise FrameError(f"{header.type.name} message of {len(payload)} bytes, at most {MAX_PAYLOAD_BYTES} fit a frame")
        # A protobuf message is never cut; a longer one than a piece makes a longer message.
        step = max(1, len(content)) if isinstance(payload, bytes) else self._piece_bytes
        for offset in range(0, max(1, len(content)), step):
            piece = content[offset : offset + step]
            yield pack(header, self._next(), offset, piece, checksum=self._checksum), piece

    def _next(self) -> int:
        """The number of the piece that comes now."""
        sequence, self._sequence = self._sequence, (self._sequence + 1) & 0xFFFFFFFF
        return sequence


def _with_length(parts: list[Part], size: int) -> list[Part]:
    """`parts` begins with room for it."""
    parts[0] = pack_prefix(size)
    return parts


class FrameReceiver(Protocol[B]):
    """What a decoder delivers to. Called in the order of the wire, from whoever feeds the decoder."""

    def admit(self, header: Header) -> B | None:
        """A tensor of header.tensor_bytes is about to come: memory for it, or None to skip it. Raises FrameError for one
        that must not come now."""

    def deliver(self, header: Header, payload: bytes | B) -> None:
        """A whole frame. A buffer is the receiver's from here on."""


class ConnectionReceiver(Protocol[B_co]):
    """What a transport without gRPC takes itself: memory that both ends see, and the end of the stream."""

    def show(self, header: Header, place: Place) -> B_co | None:
        """A tensor lies there, whole. None to skip it. Raises FrameError for one that must not come now, or not there."""

    def freed(self, place: Place) -> None:
        """The other end has done with a place. Raises FrameError for one it was not shown."""

    def ended(self, payload: bytes) -> None:
        """The other end has ended the stream with an ErrorDetail. Raises FrameError where it may not."""


@dataclass(slots=True)
class _Partial(Generic[B]):
    header: Header
    buffer: B | None  # None: its bytes are skipped
    filled: int = 0
    coming: tuple[bytes, memoryview] | None = None  # the header of a piece that goes to its place at once, and the place


class Decoder(Generic[B]):
    """Checks and joins the pieces of one direction of one stream."""

    def __init__(self, receiver: FrameReceiver[B], connection: ConnectionReceiver[B] | None = None) -> None:
        self._receiver, self._connection = receiver, connection
        self._sequence = 0
        self._partial: _Partial[B] | None = None

    def feed(self, message: bytes | memoryview) -> None:
        """Takes one message off the wire. Raises FrameError for what may not come, DamagedFrame for what is not as it was sent;
        the stream is then of no more use."""
        least = PREFIX_BYTES + HEADER_BYTES
        if not least <= len(message) <= MAX_MESSAGE_BYTES or message_bytes(message) != len(message):
            raise DamagedFrame(
                f"message of {len(message)} bytes, expected {least} to {MAX_MESSAGE_BYTES} and what it announces"
            )
        view, position = memoryview(message), PREFIX_BYTES
        while position < len(message):
            piece = unpack(view, position)
            position += HEADER_BYTES + len(piece.payload)
            if piece.header.type is FrameType.END:  # it takes the place of what was queued, and counted, before it
                self._own(piece).ended(bytes(piece.payload))
                return
            if piece.sequence != self._sequence:
                raise DamagedFrame(f"piece {piece.sequence} came, expected {self._sequence}: lost, repeated or reordered")
            self._sequence = (self._sequence + 1) & 0xFFFFFFFF
            self._take(piece)

    @property
    def goes_on(self) -> bool:
        """Whether the next piece is one of a tensor that is half there."""
        return self._partial is not None and self._partial.buffer is not None

    def place_for(self, packed: memoryview, size_bytes: int) -> memoryview | None:
        """Where a piece belongs whose header has come, and whose payload has not: whoever fills it says so with filled(). None
        where the piece is not simply the next one of its tensor; it is fed then."""
        partial = self._partial
        if partial is None or partial.buffer is None or not 0 < size_bytes <= partial.header.tensor_bytes - partial.filled:
            return None
        if not is_piece(packed, partial.header, self._sequence, partial.filled, size_bytes):
            return None
        place = partial.buffer.view[partial.filled : partial.filled + size_bytes]
        partial.coming = bytes(packed), place
        return place

    def filled(self) -> None:
        """The payload is in the place that was asked for last. Raises DamagedFrame."""
        partial = self._partial
        assert partial is not None and partial.coming is not None, "no piece was to come"  # noqa: S101, PT018
        (packed, place), partial.coming = partial.coming, None
        check_piece(memoryview(packed), place)
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        self._has_filled(partial, partial.filled + len(place))

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
            if piece.offset or piece.is_shared:
                raise FrameError(f"{piece.header.type.name} is cut or lies elsewhere; only tensors may")
            if piece.header.type is FrameType.FREE:
                self._own(piece).freed(Place.unpack(piece.payload))
                return
            self._receiver.deliver(piece.header, bytes(piece.payload))
            return
        if piece.is_shared:
            self._show(piece)
            return
        partial = self._partial
        if partial is None:
            partial = self._partial = _Partial(piece.header, self._receiver.admit(piece.header))
        self._fill(partial, piece)

    def _own(self, piece: Piece) -> ConnectionReceiver[B]:
        if self._connection is None:
            raise FrameError(f"{piece.header.type.name} with flags for shared memory; this connection has none")
        return self._connection

    def _show(self, piece: Piece) -> None:
        connection = self._own(piece)
        if self._partial is not None:
            raise FrameError(f"tensor {piece.header.tensor.name} came before another one was whole")
        buffer = connection.show(piece.header, Place.unpack(piece.payload))
        if buffer is not None:
            self._receiver.deliver(piece.header, buffer)

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
        self._has_filled(partial, end)

    def _has_filled(self, partial: _Partial[B], end: int) -> None:
        partial.filled = end
        if end == partial.header.tensor_bytes:
            self._partial = None
            if partial.buffer is not None:
                self._receiver.deliver(partial.header, partial.buffer)
