"""More than is allowed: tokens, a tensor that does not fit its header, a message above the transport's limit."""

from __future__ import annotations

import grpc
from kt_expert_proto.header import MAX_MESSAGE_BYTES, PREFIX_BYTES, FrameType, Tensor, pack, pack_prefix
from support.raw import HIDDEN, RawMember


def test_tokens(attacker: RawMember) -> None:
    code, message = attacker.ask(attacker.forward_frames(attacker.take_id(), rows=1 << 31))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 65536 are taken" in message


def test_more_bytes_than_the_header_announces(attacker: RawMember) -> None:
    request_id = attacker.take_id()
    frames = attacker.forward_frames(request_id)
    attacker.send(frames[0])
    header = attacker.header(FrameType.TENSOR, request_id, tensor=Tensor.HIDDEN_STATES)
    payload = bytes(3 * HIDDEN * 4 + 4)
    piece = pack(header, 2, 0, payload, checksum=True) + payload
    attacker.send_bytes(pack_prefix(PREFIX_BYTES + len(piece)) + piece)
    assert attacker.stream_error().code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_above_the_limit(attacker: RawMember) -> None:
    attacker.send_bytes(bytes(9 * MAX_MESSAGE_BYTES))
    assert attacker.stream_error().code() is grpc.StatusCode.RESOURCE_EXHAUSTED
