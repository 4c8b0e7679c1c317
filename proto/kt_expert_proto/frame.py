"""Frames of the session stream: one definition for client and server.

A message of the stream holds one frame or several whole frames one after another, at most MAX_MESSAGE_BYTES together: a
small request then costs one message each way. A frame is a 64-byte little-endian header and at most 1 MiB of payload::

    offset  size  field
    0       4     magic "KTX1"
    4       1     version
    5       1     type            FrameType
    6       2     flags           FLAG_CHECKSUM: `checksum` holds crc32 of the payload
    8       8     request_id      per member, increasing; 0 for frames about the stream itself
    16      4     sequence        0 for now; orders the frames of one request where a transport may reorder
    20      2     layer
    22      1     op              Op
    23      1     tensor          Tensor
    24      1     dtype           Dtype
    25      3     reserved, zero
    28      4     tokens          T
    32      4     hidden          H
    36      8     offset          of the payload in its tensor, bytes
    44      4     payload_bytes
    48      4     checksum        crc32 (zlib) of the payload
    52      4     deadline_ms     OPEN: time the server may take, from receipt; 0 for the server's default
    56      4     epoch           of the member's join
    60      4     reserved, zero
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PROTOCOL_VERSION = 2
SESSION_METHOD = "/kt_expert.v1.Session/Exchange"
MEMBER_METADATA_KEY = "kt-expert-member"
EPOCH_METADATA_KEY = "kt-expert-epoch"

MAX_PAYLOAD_BYTES = 1024 * 1024  # larger messages lose the allocator's recycled arenas, smaller ones cost more calls
_MAGIC = int.from_bytes(b"KTX1", "little")
_HEADER = struct.Struct("<IBBHQIHBBB3sIIQIIIII")
HEADER_BYTES = _HEADER.size
MAX_MESSAGE_BYTES = HEADER_BYTES + MAX_PAYLOAD_BYTES
FLAG_CHECKSUM = 1
_KNOWN_FLAGS = FLAG_CHECKSUM
_RESERVED = b"\0\0\0"


class FrameError(ValueError):
    """A message that is not a valid frame. The text says what came and what was expected."""


class FrameType(enum.IntEnum):
    OPEN = 1  # client: a request begins; payload RequestOpen
    DATA = 2  # either side: a piece of a tensor
    END = 3  # either side: all tensors of this request or result are sent
    RESULT = 4  # server: a result begins
    ERROR = 5  # server: the request's outcome is an error; payload ErrorDetail
    CANCEL = 6  # client: the request's outcome is no longer wanted
    ACK = 7  # client: the outcome of request_id has been received; gives its credits back
    RELEASE = 8  # client: the ticket request_id will not be consumed


class Op(enum.IntEnum):
    NONE = 0
    FORWARD = 1
    BACKWARD = 2


class Tensor(enum.IntEnum):
    NONE = 0
    EXPERT_IDS = 1  # int32 [T, k]
    ROUTING_WEIGHTS = 2  # fp32 [T, k]
    HIDDEN_STATES = 3  # [T, H]
    OUTPUT = 4  # [T, H]
    GRAD_OUTPUT = 5  # [T, H]
    GRAD_HIDDEN_STATES = 6  # [T, H]
    GRAD_ROUTING_WEIGHTS = 7  # fp32 [T, k]


class Dtype(enum.IntEnum):
    NONE = 0
    BF16 = 1
    FP32 = 2
    INT32 = 3


DTYPE_BYTES = {Dtype.BF16: 2, Dtype.FP32: 4, Dtype.INT32: 4}


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a frame's header that its sender sets; sizes and checksum come from the payload."""

    type: FrameType
    request_id: int = 0
    layer: int = 0
    op: Op = Op.NONE
    tensor: Tensor = Tensor.NONE
    dtype: Dtype = Dtype.NONE
    tokens: int = 0
    hidden: int = 0
    offset: int = 0
    deadline_ms: int = 0
    epoch: int = 0


def encode(header: Header, payload: bytes | bytearray | memoryview = b"", *, checksum: bool = False) -> bytes:
    """Joins header and payload with one copy. Raises FrameError for a payload above MAX_PAYLOAD_BYTES."""
    size = len(payload) if isinstance(payload, (bytes, bytearray)) else payload.nbytes
    if size > MAX_PAYLOAD_BYTES:
        raise FrameError(f"payload of {size} bytes, expected at most {MAX_PAYLOAD_BYTES}; split the tensor")
    packed = _HEADER.pack(
        _MAGIC,
        PROTOCOL_VERSION,
        header.type,
        FLAG_CHECKSUM if checksum else 0,
        header.request_id,
        0,
        header.layer,
        header.op,
        header.tensor,
        header.dtype,
        _RESERVED,
        header.tokens,
        header.hidden,
        header.offset,
        size,
        zlib.crc32(payload) if checksum else 0,
        header.deadline_ms,
        header.epoch,
        0,
    )
    return b"".join((packed, payload))


def decode(message: bytes) -> list[tuple[Header, memoryview]]:
    """Splits a message into its frames: headers and views of the payloads.

    Raises FrameError where the message is truncated or oversized, the magic, version, flags or enumerators are unknown,
    the announced size differs from the received one, or a checksum does not match.
    """
    if not HEADER_BYTES <= len(message) <= MAX_MESSAGE_BYTES:
        raise FrameError(f"message of {len(message)} bytes, expected {HEADER_BYTES} to {MAX_MESSAGE_BYTES}")
    frames, position = [], 0
    while position < len(message):
        header, payload = _decode_at(message, position)
        frames.append((header, payload))
        position += HEADER_BYTES + payload.nbytes
    return frames


def _decode_at(message: bytes, position: int) -> tuple[Header, memoryview]:
    if len(message) - position < HEADER_BYTES:
        raise FrameError(f"message ends {len(message) - position} bytes into a frame's header: truncated or misframed")
    (
        magic,
        version,
        kind,
        flags,
        request_id,
        _sequence,
        layer,
        op,
        tensor,
        dtype,
        reserved,
        tokens,
        hidden,
        offset,
        size,
        checksum,
        deadline_ms,
        epoch,
        reserved_tail,
    ) = _HEADER.unpack_from(message, position)
    if magic != _MAGIC or version != PROTOCOL_VERSION:
        raise FrameError(
            f"frame begins with magic {magic:#x} version {version}, expected {_MAGIC:#x} version {PROTOCOL_VERSION}"
        )
    if flags & ~_KNOWN_FLAGS or reserved != _RESERVED or reserved_tail:
        raise FrameError(f"frame has unknown flags {flags:#x} or a reserved field that is not zero")
    begin = position + HEADER_BYTES
    payload = memoryview(message)[begin : begin + size]
    if size != payload.nbytes:
        raise FrameError(f"frame announces {size} payload bytes and carries {payload.nbytes}: truncated or misframed")
    if flags & FLAG_CHECKSUM and zlib.crc32(payload) != checksum:
        raise FrameError("payload checksum does not match: the frame was damaged on its way")
    try:
        header = Header(
            FrameType(kind),
            request_id,
            layer,
            Op(op),
            Tensor(tensor),
            Dtype(dtype),
            tokens,
            hidden,
            offset,
            deadline_ms,
            epoch,
        )
    except ValueError as error:
        raise FrameError(f"frame names an enumerator this version does not know: {error}") from None
    return header, payload


def tensor_frames(header: Header, data: memoryview, *, checksum: bool = False) -> list[bytes]:
    """DATA frames that carry `data`, in order. `header` gives everything but type and offset."""
    view = data.cast("B") if data.format != "B" or data.ndim != 1 else data
    frames = []
    for offset in range(0, view.nbytes, MAX_PAYLOAD_BYTES):
        piece = Header(
            FrameType.DATA,
            header.request_id,
            header.layer,
            header.op,
            header.tensor,
            header.dtype,
            header.tokens,
            header.hidden,
            offset,
            0,
            header.epoch,
        )
        frames.append(encode(piece, view[offset : offset + MAX_PAYLOAD_BYTES], checksum=checksum))
    return frames


def coalesce(frames: Iterable[bytes]) -> Iterator[bytes]:
    """Messages that carry `frames` in order: small neighbours travel together, large ones are passed on uncopied."""
    waiting: list[bytes] = []
    size = 0
    for frame in frames:
        if waiting and size + len(frame) > MAX_MESSAGE_BYTES:
            yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
            waiting, size = [], 0
        waiting.append(frame)
        size += len(frame)
    if waiting:
        yield waiting[0] if len(waiting) == 1 else b"".join(waiting)
