"""A frame of another version of the protocol, or without its checksum's flag."""

from __future__ import annotations

import grpc
from kt_expert_proto.header import PREFIX_BYTES, FrameType, pack, pack_prefix
from support.raw import RawMember


def raw_frame(attacker: RawMember, version: int) -> bytes:
    packed = bytearray(pack(attacker.header(FrameType.ACK, 0), 1, 0, b"", checksum=False))
    packed[4] = version
    return pack_prefix(PREFIX_BYTES + len(packed)) + bytes(packed)


def test_another_version(attacker: RawMember) -> None:
    attacker.send_bytes(raw_frame(attacker, 2))
    error = attacker.stream_error()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "frame has version 2" in error.details()


def test_a_checksum_whose_flag_is_gone(attacker: RawMember) -> None:
    message = bytearray(attacker.encoded((attacker.header(FrameType.ACK, 0), b"")))
    message[PREFIX_BYTES + 6] &= 0xFE
    attacker.send_bytes(bytes(message))
    assert attacker.stream_error().code() is grpc.StatusCode.DATA_LOSS
