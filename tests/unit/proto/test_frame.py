"""Frames: what is encoded comes back, and nothing else is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kt_expert_proto.frame import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    Dtype,
    FrameError,
    FrameType,
    Header,
    Op,
    Tensor,
    coalesce,
    decode,
    encode,
    tensor_frames,
)

HEADER = Header(FrameType.DATA, 7, 3, Op.FORWARD, Tensor.HIDDEN_STATES, Dtype.BF16, 5, 6, 1 << 40, 9, 11)
headers = st.builds(
    Header,
    st.sampled_from(FrameType),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**16 - 1),
    st.sampled_from(Op),
    st.sampled_from(Tensor),
    st.sampled_from(Dtype),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)


@given(st.lists(st.tuples(headers, st.binary(max_size=300), st.booleans()), min_size=1, max_size=8))
def test_frames_round_trip_through_messages(frames: list[tuple[Header, bytes, bool]]) -> None:
    encoded = [encode(header, payload, checksum=checksum) for header, payload, checksum in frames]
    decoded = [frame for message in coalesce(encoded) for frame in decode(message)]
    assert [(header, bytes(payload)) for header, payload in decoded] == [frame[:2] for frame in frames]


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused_and_never_crash(message: bytes) -> None:
    with pytest.raises(FrameError):
        decode(message)


@given(st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
def test_a_damaged_header_is_refused_or_still_a_frame(position: int, flip: int) -> None:
    message = bytearray(encode(HEADER, b"payload", checksum=True))
    message[position] ^= flip
    try:
        frames = decode(bytes(message))
    except FrameError:
        return
    assert len(frames) == 1


DAMAGE = {
    "truncated header": (lambda m: m[:63], "63 bytes, expected 64"),
    "truncated payload": (lambda m: m[:-1], "announces 7 payload bytes and carries 6"),
    "trailing bytes": (lambda m: m + b"x", "ends 1 bytes into a frame's header"),
    "oversized": (lambda m: m + bytes(MAX_MESSAGE_BYTES), "expected 64 to"),
    "magic": (lambda m: b"KTX2" + m[4:], "magic"),
    "version": (lambda m: m[:4] + b"\x03" + m[5:], "version 3"),
    "type": (lambda m: m[:5] + b"\xff" + m[6:], "enumerator"),
    "flags": (lambda m: m[:6] + b"\x80" + m[7:], "unknown flags"),
    "reserved": (lambda m: m[:25] + b"\x01" + m[26:], "reserved"),
    "payload": (lambda m: m[:-1] + b"X", "checksum does not match"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(what: str) -> None:
    change, text = DAMAGE[what]
    with pytest.raises(FrameError, match=text):
        decode(change(encode(HEADER, b"payload", checksum=True)))


def test_a_payload_above_the_limit_is_not_encoded() -> None:
    with pytest.raises(FrameError, match="split the tensor"):
        encode(HEADER, bytes(MAX_PAYLOAD_BYTES + 1))


def test_tensors_are_cut_into_ordered_pieces() -> None:
    data = bytes(range(256)) * (MAX_PAYLOAD_BYTES // 128)
    pieces = [decode(frame)[0] for frame in tensor_frames(HEADER, memoryview(data))]
    assert [header.offset for header, _ in pieces] == [0, MAX_PAYLOAD_BYTES]
    assert b"".join(bytes(payload) for _, payload in pieces) == data


def test_small_frames_share_a_message_and_large_ones_do_not() -> None:
    small, large = encode(HEADER, b"ab"), encode(HEADER, bytes(MAX_PAYLOAD_BYTES))
    messages = list(coalesce([small, small, large, small]))
    assert [len(message) for message in messages] == [2 * len(small), len(large), len(small)]
    assert messages[1] is large
