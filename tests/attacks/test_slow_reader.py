"""A member that does not read what it asked for: it holds its own credits, and nobody else waits for it."""

from __future__ import annotations

import time
import uuid

import grpc
from support.raw import RawMember
from support.server import ServerProcess


def test_others_do_not_wait(server: ServerProcess, attacker: RawMember) -> None:
    for _ in range(attacker.joined.credit_requests):
        attacker.send(*attacker.forward_frames(attacker.take_id()))
    with RawMember(server.address, f"other-{uuid.uuid4().hex}") as other:
        begun = time.monotonic()
        for _ in range(20):
            assert other.ask(other.forward_frames(other.take_id(), save=False))[0] is grpc.StatusCode.OK
        assert time.monotonic() - begun < 10
        other.leave()
