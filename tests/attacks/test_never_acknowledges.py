"""A member that takes outcomes and never says so: its credits run out, and then its stream ends."""

from __future__ import annotations

import grpc
from support.raw import RawMember


def test_never_acknowledging(attacker: RawMember) -> None:
    for _ in range(8 * attacker.joined.credit_requests):
        attacker.send(*attacker.forward_frames(attacker.take_id(), save=False))
    error = attacker.stream_error()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "outcomes are not acknowledged" in error.details()
