"""The header of a frame: one definition for client and server.

A frame is a 64-byte little-endian header and a payload. A tensor's payload may be cut into pieces of at most 1 MiB, each with
a header of its own; what a transport hands on is the header of the first piece and the whole tensor::

    offset  size  field
    0       4     magic "KTX1"
    4       1     version
    5       1     type            FrameType
    6       2     flags           FLAG_CHECKSUM: `checksum` is set; FLAG_SHARED: the payload says where the tensor lies
    8       8     request_id      per member, increasing; 0 for frames about the stream itself
    16      4     sequence        counts the pieces of one direction of one stream, from 0
    20      2     layer
    22      1     op              Op
    23      1     tensor          Tensor
    24      1     dtype           Dtype
    25      3     reserved, zero
    28      4     rows            of the tensor: tokens, or experts times rows of a LoRA matrix
    32      4     columns
    36      8     offset          of the piece in its tensor, bytes
    44      4     payload_bytes   of the piece
    48      4     checksum        CRC-32C of the header, this field taken as zero, and the piece
    52      4     deadline_ms     REQUEST: time the server may take, from receipt; 0 for the server's default
    56      4     epoch           which of its member's streams this is; each new one has a higher number
    60      4     reserved, zero

CRC-32C is that of RFC 3720, appendix B.4.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from crc32c import crc32c

from kt_expert_proto.dtypes import ITEM_BYTES, Dtype

PROTOCOL_VERSION = 8
MAX_PAYLOAD_BYTES = 1024 * 1024  # larger messages lose the allocator's recycled arenas, smaller ones cost more calls
FLAG_CHECKSUM = 1
FLAG_SHARED = 2  # of a TENSOR in memory that both ends see (kt_expert_proto/shared.py); the checksum covers its place alone
_KNOWN_FLAGS = FLAG_CHECKSUM | FLAG_SHARED
_MAGIC = int.from_bytes(b"KTX1", "little")
_HEADER = struct.Struct("<IBBHQIHBBB3sIIQIIIII")
_CHECKSUM = struct.Struct("<I")
_CHECKSUM_AT, _FLAGS_AT = 48, 6
HEADER_BYTES = _HEADER.size
# Before the pieces of a message: its length, so that a cut one is found at once, and the length's complement: on a bare socket
# a length that was changed on its way would have both ends wait for bytes that never come.
_PREFIX = struct.Struct("<II")
PREFIX_BYTES = _PREFIX.size
MAX_MESSAGE_BYTES = PREFIX_BYTES + HEADER_BYTES + MAX_PAYLOAD_BYTES
_ALL_BITS = 0xFFFFFFFF
_RESERVED = b"\0\0\0"
_WITHOUT_FLAG = "a checksum without its flag: the frame was damaged on its way"


class FrameError(ValueError):
    """A message that is not a valid frame, or not one that may come now. The text says what came and what was expected."""


class DamagedFrame(FrameError):
    """Bytes that are not what was sent: cut, changed, lost, repeated or reordered on their way. Another stream may serve."""


def pack_prefix(size: int) -> bytes:
    """Of a message of so many bytes, the prefix among them."""
    return _PREFIX.pack(size, size ^ _ALL_BITS)


def message_bytes(memory: bytes | memoryview, at: int = 0) -> int:
    """How long the message is whose prefix lies there. Raises DamagedFrame for what cannot be one."""
    size, complement = _PREFIX.unpack_from(memory, at)
    if size ^ _ALL_BITS != complement or not PREFIX_BYTES + HEADER_BYTES <= size <= MAX_MESSAGE_BYTES:
        raise DamagedFrame(
            f"a message announces {size} bytes and their complement as {complement}, expected "
            f"{PREFIX_BYTES + HEADER_BYTES} to {MAX_MESSAGE_BYTES} bytes"
        )
    return int(size)


class FrameType(enum.IntEnum):
    JOIN = 1  # client, first frame of a stream; payload Join
    JOINED = 2  # server, first frame of a stream; payload Joined
    REQUEST = 3  # client: a request begins, its tensors follow; payload RequestOpen
    TENSOR = 4  # either side: a tensor of the request or result before it
    RESULT = 5  # server: a result begins, its tensors follow; payload ResultHead
    ERROR = 6  # server: the request's outcome is an error; payload ErrorDetail
    CANCEL = 7  # client: the request's outcome is no longer wanted
    ACK = 8  # client: the outcomes of all requests up to request_id have been received; gives their credits back.
    # Said again, it asks for the same frame from the server: whether all messages of both directions arrive
    RELEASE = 9  # client: the ticket request_id will not be consumed
    FREE = 10  # either side, where memory is shared: its reader has done with a place of it; for transports alone
    END = 11  # server, where the connection itself cannot carry it: the error that ends the stream; payload ErrorDetail


class Op(enum.IntEnum):
    NONE = 0
    FORWARD = 1
    BACKWARD = 2
    GRAD_NORM = 3
    STEP = 4
    ZERO_GRAD = 5
    LIST_TENSORS = 6
    READ_TENSOR = 7
    WRITE_TENSOR = 8
    SET_STEP = 9
    SAVE_CHECKPOINT = 10
    LOAD_CHECKPOINT = 11
    LEAVE = 12
    EDIT_GRADIENTS = 13
    CREATE_ADAPTER = 14
    DELETE_ADAPTER = 15


class Tensor(enum.IntEnum):
    NONE = 0
    EXPERT_IDS = 1  # int32 [T, k]
    ROUTING_WEIGHTS = 2  # fp32 [T, k]
    HIDDEN_STATES = 3  # [T, H]
    OUTPUT = 4  # [T, H]
    GRAD_OUTPUT = 5  # [T, H]
    GRAD_HIDDEN_STATES = 6  # [T, H]
    GRAD_ROUTING_WEIGHTS = 7  # fp32 [T, k]
    ADAPTER = 8  # fp32 [E * rows, columns]


# A look-up in place of a call: every piece passes here.
_TYPES = {int(each): each for each in FrameType}
_OPS = {int(each): each for each in Op}
_TENSORS = {int(each): each for each in Tensor}
_DTYPES = {int(each): each for each in Dtype}


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header that its sender sets; sequence, sizes and checksum come with the bytes."""

    type: FrameType
    request_id: int = 0
    layer: int = 0
    op: Op = Op.NONE
    tensor: Tensor = Tensor.NONE
    dtype: Dtype = Dtype.NONE
    rows: int = 0
    columns: int = 0
    deadline_ms: int = 0
    epoch: int = 0

    @property
    def tensor_bytes(self) -> int:
        """Of the whole tensor that a TENSOR frame carries."""
        return self.rows * self.columns * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Piece:
    """One header as it was found on the wire, and its payload."""

    header: Header
    sequence: int
    offset: int
    payload: memoryview
    is_shared: bool = False  # the payload is the tensor's place


def pack(
    header: Header, sequence: int, offset: int, payload: bytes | memoryview, *, checksum: bool, shared: bool = False
) -> bytes:
    """The 64 bytes before a piece of at most MAX_PAYLOAD_BYTES."""
    flags = (FLAG_CHECKSUM if checksum else 0) | (FLAG_SHARED if shared else 0)
    packed = _packed(header, sequence, offset, len(payload), flags)
    if not checksum:
        return packed
    total = _CHECKSUM.pack(crc32c(payload, crc32c(packed)))
    return packed[:_CHECKSUM_AT] + total + packed[_CHECKSUM_AT + _CHECKSUM.size :]


def _packed(header: Header, sequence: int, offset: int, size: int, flags: int) -> bytes:
    """Without a checksum."""
    return _HEADER.pack(
        _MAGIC, PROTOCOL_VERSION, header.type, flags, header.request_id, sequence, header.layer,
        header.op, header.tensor, header.dtype, _RESERVED, header.rows, header.columns, offset, size, 0,
        header.deadline_ms, header.epoch, 0,
    )  # fmt: skip


def unpack(message: memoryview, position: int) -> Piece:
    """The piece at `position`.

    Raises FrameError where it is truncated, the magic, version, flags or enumerators are unknown, the announced size differs
    from the received one, or a checksum does not match.
    """
    if len(message) - position < HEADER_BYTES:
        raise DamagedFrame(f"message ends {len(message) - position} bytes into a frame's header: truncated or misframed")
    (
        magic, version, kind, flags, request_id, sequence, layer, op, tensor, dtype, reserved, rows, columns, offset, size,
        checksum, deadline_ms, epoch, reserved_tail,
    ) = _HEADER.unpack_from(message, position)  # fmt: skip
    if magic != _MAGIC:
        raise DamagedFrame(f"frame begins with magic {magic:#x}, expected {_MAGIC:#x}")
    begin = position + HEADER_BYTES
    payload = message[begin : begin + size]
    if size != len(payload) or size > MAX_PAYLOAD_BYTES:
        raise DamagedFrame(f"frame announces {size} payload bytes and carries {len(payload)}: truncated or misframed")
    if flags & FLAG_CHECKSUM:
        _check(message[position:begin], payload, checksum)
    elif checksum:
        raise DamagedFrame(_WITHOUT_FLAG)
    if version != PROTOCOL_VERSION:
        raise FrameError(f"frame has version {version}, expected {PROTOCOL_VERSION}; install matching versions of kt-expert")
    if flags & ~_KNOWN_FLAGS or reserved != _RESERVED or reserved_tail:
        raise FrameError(f"frame has unknown flags {flags:#x} or a reserved field that is not zero")
    try:
        header = Header(
            _TYPES[kind], request_id, layer, _OPS[op], _TENSORS[tensor], _DTYPES[dtype], rows, columns, deadline_ms, epoch
        )
    except KeyError as error:
        raise FrameError(f"frame names an enumerator this version does not know: {error}") from None
    return Piece(header, sequence, offset, payload, bool(flags & FLAG_SHARED))


def is_piece(packed: memoryview, header: Header, sequence: int, offset: int, size: int) -> bool:
    """Whether these 64 bytes announce exactly that piece of a tensor. Their checksum is looked at by check_piece."""
    flags = int.from_bytes(packed[_FLAGS_AT : _FLAGS_AT + 2], "little") & FLAG_CHECKSUM
    expected = _packed(header, sequence, offset, size, flags)
    after = _CHECKSUM_AT + _CHECKSUM.size
    return packed[:_CHECKSUM_AT] == expected[:_CHECKSUM_AT] and packed[after:] == expected[after:]


def check_piece(packed: memoryview, payload: memoryview) -> None:
    """Raises DamagedFrame for a piece whose header is_piece and whose checksum does not match."""
    checksum = _CHECKSUM.unpack_from(packed, _CHECKSUM_AT)[0]
    if packed[_FLAGS_AT] & FLAG_CHECKSUM:
        _check(packed, payload, checksum)
    elif checksum:
        raise DamagedFrame(_WITHOUT_FLAG)


def _check(packed: memoryview, payload: memoryview, expected: int) -> None:
    whole = crc32c(packed[:_CHECKSUM_AT])
    whole = crc32c(packed[_CHECKSUM_AT + _CHECKSUM.size :], crc32c(bytes(_CHECKSUM.size), whole))
    if crc32c(payload, whole) != expected:
        raise DamagedFrame("checksum does not match: the frame was damaged on its way")
