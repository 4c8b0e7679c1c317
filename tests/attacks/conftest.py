"""Each file is one attack, with the code it must get; afterwards the server must serve another trainer as before."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import grpc
import pytest
from support.raw import RawMember
from support.server import ServerProcess


@pytest.fixture
def attacker(server: ServerProcess) -> Iterator[RawMember]:
    with RawMember(server.address, f"attack-{uuid.uuid4().hex}") as member:
        yield member


@pytest.fixture(autouse=True)
def _others_are_served(server: ServerProcess) -> Iterator[None]:
    yield
    with RawMember(server.address, f"bystander-{uuid.uuid4().hex}") as other:
        assert other.ask(other.forward_frames(other.take_id()))[0] is grpc.StatusCode.OK
        other.leave()
