"""Frames: what is sent comes back, cut and joined as it may be, and nothing else is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kt_expert_proto.codec import Decoder, Encoder, Memory, Outbound
from kt_expert_proto.dtypes import ITEM_BYTES, Dtype
from kt_expert_proto.header import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX_BYTES,
    DamagedFrame,
    FrameError,
    FrameType,
    Header,
    Op,
    Tensor,
    pack,
    pack_prefix,
    unpack,
)
from kt_expert_proto.shared import Place

headers = st.builds(
    Header,
    st.sampled_from([kind for kind in FrameType if kind not in (FrameType.TENSOR, FrameType.FREE, FrameType.END)]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**16 - 1),
    st.sampled_from(Op),
    st.sampled_from(Tensor),
    st.sampled_from(Dtype),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)


class Received:
    """Implements FrameReceiver and, for its tensors, Buffer."""

    def __init__(self, skip: frozenset[int] = frozenset()) -> None:
        self.frames: list[tuple[Header, bytes]] = []
        self.released = 0
        self._skip = skip

    def admit(self, header: Header) -> _Buffer | None:
        return None if header.request_id in self._skip else _Buffer(self, header.tensor_bytes)

    def deliver(self, header: Header, payload: bytes | _Buffer) -> None:
        self.frames.append((header, payload if isinstance(payload, bytes) else bytes(payload.view)))


class _Buffer:
    def __init__(self, owner: Received, size: int) -> None:
        self._owner = owner
        self.view = memoryview(bytearray(size))

    def release(self) -> None:
        self._owner.released += 1


def tensor(request_id: int, content: bytes, columns: int = 1) -> Outbound:
    rows = len(content) // columns // ITEM_BYTES[Dtype.BF16]
    header = Header(FrameType.TENSOR, request_id, 3, Op.FORWARD, Tensor.HIDDEN_STATES, Dtype.BF16, rows, columns, 0, 7)
    return header, Memory(memoryview(content))


def transfer(messages: list[bytes], receiver: Received | None = None) -> list[tuple[Header, bytes]]:
    receiver = receiver or Received()
    decoder: Decoder[_Buffer] = Decoder(receiver)
    for message in messages:
        decoder.feed(message)
    return receiver.frames


@given(st.lists(st.tuples(headers, st.binary(max_size=200)), max_size=20), st.booleans())
def test_frames_come_back(frames: list[Outbound], checksum: bool) -> None:
    messages = list(Encoder(checksum=checksum).messages(frames))
    assert transfer(messages) == frames
    assert len(messages) == (1 if frames else 0)


@pytest.mark.parametrize(
    "size", [0, 2, MAX_PAYLOAD_BYTES - 2, MAX_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES + 2, 3 * MAX_PAYLOAD_BYTES + 10]
)
def test_tensors_are_cut_and_joined(size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    frames = [tensor(5, content[:size]), (Header(FrameType.RELEASE, 4), b""), tensor(6, b"ab")]
    messages = list(Encoder().messages(frames))
    assert all(len(message) <= MAX_MESSAGE_BYTES for message in messages)
    got = transfer(messages)
    assert [header for header, _ in got] == [header for header, _ in frames]
    assert [payload for _, payload in got] == [content[:size], b"", b"ab"]


def test_small_frames_travel_together() -> None:
    frames: list[Outbound] = [(Header(FrameType.ACK, each), b"") for each in range(100)]
    assert len(list(Encoder().messages([*frames, tensor(1, bytes(MAX_PAYLOAD_BYTES))]))) == 2


def test_a_tensor_nobody_wants_is_passed_over() -> None:
    frames = [tensor(1, bytes(2 * MAX_PAYLOAD_BYTES)), tensor(2, b"cd")]
    got = transfer(list(Encoder().messages(frames)), Received(frozenset({1})))
    assert [(header.request_id, payload) for header, payload in got] == [(2, b"cd")]


def test_a_half_received_tensor_is_given_back() -> None:
    receiver = Received()
    decoder: Decoder[_Buffer] = Decoder(receiver)
    messages = list(Encoder().messages([tensor(1, bytes(2 * MAX_PAYLOAD_BYTES))]))
    decoder.feed(messages[0])
    decoder.close()
    decoder.close()
    assert receiver.released == 1


def pieces(*contents: tuple[Header, int, int, bytes]) -> bytes:
    joined = b"".join(pack(*head, payload, checksum=True) + payload for *head, payload in contents)
    return pack_prefix(PREFIX_BYTES + len(joined)) + joined


HIDDEN = Header(FrameType.TENSOR, 1, tensor=Tensor.HIDDEN_STATES, dtype=Dtype.BF16, rows=4, columns=1)
WRONG = {
    "a gap": (pieces((HIDDEN, 0, 0, b"ab"), (HIDDEN, 1, 4, b"ef")), "bytes 4 to 6 came"),
    "an overlap": (pieces((HIDDEN, 0, 0, b"abcd"), (HIDDEN, 1, 2, b"cdef")), "bytes 2 to 6 came"),
    "too much": (pieces((HIDDEN, 0, 0, b"abcdefghij")), "bytes 0 to 10 came"),
    "an empty piece": (pieces((HIDDEN, 0, 0, b"ab"), (HIDDEN, 1, 2, b"")), "bytes 2 to 2 came"),
    "another frame": (pieces((HIDDEN, 0, 0, b"ab"), (Header(FrameType.ACK, 1), 1, 0, b"")), "ACK came after 2 of 8"),
    "a cut message": (pieces((Header(FrameType.JOIN), 0, 8, b"ab")), "only tensors may"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_pieces_that_do_not_fit_are_refused(what: str) -> None:
    message, text = WRONG[what]
    with pytest.raises(FrameError, match=text):
        transfer([message])


def test_a_message_cut_between_two_frames_is_found() -> None:
    (message,) = Encoder().messages([(Header(FrameType.ACK, 1), b""), (Header(FrameType.RELEASE, 1), b"")])
    with pytest.raises(DamagedFrame, match="and what it announces"):
        transfer([message[: PREFIX_BYTES + HEADER_BYTES]])


def test_sequence_numbers_are_checked() -> None:
    frames = [next(iter(Encoder().messages([(Header(FrameType.ACK, 1), b"")])))] * 2
    with pytest.raises(DamagedFrame, match="piece 0 came, expected 1: lost, repeated or reordered"):
        transfer(frames)


@given(st.integers(0, PREFIX_BYTES + HEADER_BYTES + 9), st.integers(0, 7))
def test_every_changed_bit_is_found(at: int, bit: int) -> None:
    message = bytearray(next(iter(Encoder().messages([(Header(FrameType.ACK, 77, epoch=3), b"0123456789")]))))
    message[at] ^= 1 << bit
    with pytest.raises(DamagedFrame):
        transfer([bytes(message)])


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_random_bytes_are_refused(message: bytes) -> None:
    with pytest.raises(FrameError):
        transfer([message])


def test_a_message_too_long_for_a_frame_is_an_error() -> None:
    with pytest.raises(FrameError, match="at most 1048576 fit a frame"):
        list(Encoder().messages([(Header(FrameType.JOIN), bytes(MAX_PAYLOAD_BYTES + 1))]))


@given(headers, st.binary(max_size=50), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_headers_come_back(header: Header, payload: bytes, sequence: int, offset: int) -> None:
    piece = unpack(memoryview(b"xyz" + pack(header, sequence, offset, payload, checksum=True) + payload), 3)
    assert (piece.header, piece.sequence, piece.offset, bytes(piece.payload)) == (header, sequence, offset, payload)


def test_another_version_is_named() -> None:
    packed = bytearray(pack(Header(FrameType.ACK), 0, 0, b"", checksum=False))
    packed[4] = 99
    with pytest.raises(FrameError, match="frame has version 99, expected") as caught:
        unpack(memoryview(packed), 0)
    assert not isinstance(caught.value, DamagedFrame)


class _Connection:
    """Implements ConnectionReceiver: a region in which each place holds a tensor of its generation's number."""

    def __init__(self, received: Received) -> None:
        self._received = received
        self.freed_places: list[Place] = []
        self.end = b""

    def show(self, header: Header, place: Place) -> _Buffer | None:
        buffer = self._received.admit(header)
        if buffer is not None:
            buffer.view[:] = bytes([place.generation]) * len(buffer.view)
        return buffer

    def freed(self, place: Place) -> None:
        self.freed_places.append(place)

    def ended(self, payload: bytes) -> None:
        self.end = payload


def test_places_come_in_line_with_other_frames() -> None:
    received = Received(skip=frozenset({2}))
    connection = _Connection(received)
    header, _ = tensor(1, bytes(8))
    skipped, _ = tensor(2, bytes(8))
    free = (Header(FrameType.FREE), Place(4096, 9).pack())
    sent: list[Outbound] = [(header, Place(0, 3)), free, (skipped, Place(0, 4)), (Header(FrameType.RESULT, 5), b"x")]
    decoder: Decoder[_Buffer] = Decoder(received, connection)
    for message in Encoder().messages(sent):
        decoder.feed(message)
    assert received.frames == [(header, bytes([3]) * 8), (Header(FrameType.RESULT, 5), b"x")]
    assert connection.freed_places == [Place(4096, 9)]


@pytest.mark.parametrize("kind", [FrameType.FREE, FrameType.END, FrameType.TENSOR])
def test_a_stream_without_shared_memory_refuses_what_speaks_of_it(kind: FrameType) -> None:
    frame = (tensor(1, bytes(8))[0], Place(0, 1)) if kind is FrameType.TENSOR else (Header(kind), Place(0, 1).pack())
    with pytest.raises(FrameError, match="this connection has none"):
        transfer(list(Encoder().messages([frame])))


def test_an_end_is_heard_in_the_middle_of_a_tensor() -> None:
    """It takes the place of what was queued and counted before it."""
    received = Received()
    connection = _Connection(received)
    decoder: Decoder[_Buffer] = Decoder(received, connection)
    encoder = Encoder(piece_bytes=100)
    messages = encoder.messages([tensor(1, bytes(400))])
    decoder.feed(next(messages))
    list(messages)
    for message in encoder.messages([(Header(FrameType.END), b"why")]):
        decoder.feed(message)
    assert connection.end == b"why"
    assert received.frames == []
    decoder.close()
    assert received.released == 1
