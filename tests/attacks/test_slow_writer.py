"""A member that begins a request and does not go on with it."""

from __future__ import annotations

import grpc
from support.raw import RawMember
from support.server import ServerProcess
from support.waiting import wait_until


def test_a_request_that_never_ends(server: ServerProcess, attacker: RawMember) -> None:
    before = server.metric('kt_expert_memory_bytes{kind="requests"}')
    attacker.send(*attacker.forward_frames(attacker.take_id(), deadline_ms=300)[:2])
    assert attacker.ask([])[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: server.metric('kt_expert_memory_bytes{kind="requests"}') == before, what="its memory to be given back")
