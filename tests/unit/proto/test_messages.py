"""A stream of bytes: its messages are found however they come, and what goes on with a tensor is received where it belongs."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kt_expert_proto.codec import Decoder, Encoder, Memory, Outbound
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import (
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    PREFIX_BYTES,
    DamagedFrame,
    FrameError,
    FrameType,
    Header,
    Op,
    Tensor,
    pack_prefix,
)
from kt_expert_proto.messages import Messages, joined, rest_of

PIECE_BYTES = 100  # so that tensors of some hundred bytes come in many pieces


def rng(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311  # for tests


class Received:
    """Implements FrameReceiver and, for its tensors, Buffer."""

    def __init__(self, skip: frozenset[int] = frozenset()) -> None:
        self.frames: list[tuple[Header, bytes]] = []
        self.held = 0
        self.received_in_place = 0
        self._skip = skip

    def admit(self, header: Header) -> _Buffer | None:
        if header.request_id in self._skip:
            return None
        self.held += 1
        return _Buffer(self, header.tensor_bytes)

    def deliver(self, header: Header, payload: bytes | _Buffer) -> None:
        if isinstance(payload, bytes):
            self.frames.append((header, payload))
        else:
            self.frames.append((header, bytes(payload.view)))
            payload.release()


class _Buffer:
    def __init__(self, owner: Received, size: int) -> None:
        self._owner = owner
        self.view = memoryview(bytearray(size))

    def release(self) -> None:
        self._owner.held -= 1


def header_of(request_id: int, size: int) -> Header:
    return Header(FrameType.TENSOR, request_id, 3, Op.FORWARD, Tensor.HIDDEN_STATES, Dtype.BF16, size // 2, 1, 0, 7)


def stream_of(contents: list[tuple[bool, bytes]], *, checksum: bool = True) -> tuple[bytes, list[tuple[Header, bytes]]]:
    """Tensors, and messages of other kinds, as they travel; and the frames that they are."""
    frames = [
        (header_of(number, len(content)) if is_tensor else Header(FrameType.RESULT, number), content)
        for number, (is_tensor, content) in enumerate(contents)
    ]
    outbound: list[Outbound] = [
        (header, Memory(memoryview(content)) if header.type is FrameType.TENSOR else content) for header, content in frames
    ]
    return b"".join(Encoder(checksum=checksum, piece_bytes=PIECE_BYTES).messages(outbound)), frames


def receive(stream: bytes, received: Received, seed: int) -> tuple[Decoder[_Buffer], Messages]:
    """In bites of random sizes."""
    sizes, decoder = rng(seed), Decoder(received)
    messages = Messages(decoder)
    while stream:
        room = messages.room()
        received.received_in_place += len(room) < PIECE_BYTES
        size = min(sizes.randint(1, 3 * PIECE_BYTES), len(stream), len(room))
        room[:size] = stream[:size]
        stream = stream[size:]
        for message in messages.received(size):
            decoder.feed(message)
    return decoder, messages


contents = st.lists(
    st.tuples(st.booleans(), st.integers(0, 450).map(lambda pairs: bytes(index % 251 for index in range(2 * pairs)))),
    min_size=1,
    max_size=8,
)


@given(contents, st.booleans(), st.integers(0, 2**32))
def test_frames_come_back_however_their_bytes_come(sent: list[tuple[bool, bytes]], checksum: bool, seed: int) -> None:
    stream, expected = stream_of(sent, checksum=checksum)
    received = Received()
    receive(stream, received, seed)
    assert received.frames == expected
    assert received.held == 0


@given(contents, st.integers(0, 2**32))
def test_a_changed_bit_is_found_and_nothing_wrong_is_delivered(sent: list[tuple[bool, bytes]], seed: int) -> None:
    """Wherever it is, so that nobody waits for what never comes."""
    stream, expected = stream_of(sent)
    choice, received = rng(seed), Received()
    at = choice.randrange(len(stream))
    damaged = stream[:at] + bytes([stream[at] ^ (1 << choice.randrange(8))]) + stream[at + 1 :]
    with pytest.raises(DamagedFrame):
        receive(damaged, received, seed)
    assert received.frames == expected[: len(received.frames)]


def test_the_pieces_of_a_large_tensor_are_received_in_their_places() -> None:
    content = rng(0).randbytes(20 * PIECE_BYTES)
    stream, expected = stream_of([(True, content)])
    received = Received()
    receive(stream, received, 1)
    assert received.frames == expected
    assert received.received_in_place > 10


def test_skipped_tensors_are_passed_over() -> None:
    stream, expected = stream_of([(True, bytes(1000)), (True, bytes(700))])
    received = Received(skip=frozenset({0}))
    receive(stream, received, 2)
    assert received.frames == expected[1:]


def test_a_piece_of_another_tensor_is_refused() -> None:
    stream, _ = stream_of([(True, bytes(1000))])
    other = b"".join(Encoder(piece_bytes=PIECE_BYTES).messages([(header_of(9, 1000), Memory(memoryview(bytes(1000))))]))
    half = len(stream) // 10 * 5  # as long as the other's: ten messages of one length
    received = Received()
    with pytest.raises(FrameError, match="expected HIDDEN_STATES of request 0 to go on"):
        receive(stream[:half] + other[half:], received, 3)


def test_what_is_half_there_is_given_back() -> None:
    stream, _ = stream_of([(True, bytes(1000))])
    received = Received()
    decoder, _ = receive(stream[: len(stream) // 2], received, 4)
    assert received.held == 1
    decoder.close()
    assert (received.held, received.frames) == (0, [])


def test_large_messages_find_room_again_and_again() -> None:
    received, encoder = Received(), Encoder()
    decoder: Decoder[_Buffer] = Decoder(received)
    messages = Messages(decoder)
    content = bytes(MAX_PAYLOAD_BYTES)
    for number in range(8):
        (message,) = encoder.messages([(Header(FrameType.RESULT, number), content)])
        for begin in range(0, len(message), 700_001):
            piece = message[begin : begin + 700_001]
            assert len(messages.room()) >= len(piece)
            messages.room()[: len(piece)] = piece
            found = [bytes(each) for each in messages.received(len(piece))]
        assert found == [message]


@pytest.mark.parametrize("length", [0, PREFIX_BYTES, MAX_MESSAGE_BYTES + 1, 2**32 - 1])
def test_a_length_that_no_message_has_is_refused(length: int) -> None:
    messages = Messages(Decoder(Received()))
    messages.room()[:PREFIX_BYTES] = pack_prefix(length)
    with pytest.raises(DamagedFrame, match=f"announces {length} bytes"):
        list(messages.received(PREFIX_BYTES))


@given(st.lists(st.binary(max_size=50), min_size=1, max_size=5), st.integers(0, 300))
def test_what_was_not_sent_is_left(parts: list[bytes], sent: int) -> None:
    whole = b"".join(parts)
    assert b"".join(rest_of(list(parts), min(sent, len(whole)))) == whole[sent:]


def test_small_messages_are_joined_and_large_ones_are_not_copied() -> None:
    assert joined([b"ab", b"c"]) == [b"abc"]
    large = [b"ab", bytes(1 << 20)]
    assert joined(large) is large
