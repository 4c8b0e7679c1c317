"""Each file is one attack, with the code it must get; afterwards the server must serve another trainer as before."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from support.raw import RawMember
from support.server import ServerProcess
from support.tokens import write_tokens


@pytest.fixture
def attacker(server: ServerProcess) -> Iterator[RawMember]:
    with RawMember(server.address, f"attack-{uuid.uuid4().hex}") as member:
        yield member


@pytest.fixture(scope="session")
def guarded_server(qwen3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Knows tokens of two trainers, alice and bob, and of an administrator, root."""
    directory = tmp_path_factory.mktemp("guarded")
    tokens = write_tokens(directory / "tokens", alice="train", bob="train", root="admin")
    options = ("--token-file", str(tokens), "--state-dir", str(directory / "state"), "--calls-per-second", "1000")
    with ServerProcess(qwen3_checkpoint, directory / "log", *options) as process:
        yield process


@pytest.fixture(autouse=True)
def _others_are_served(server: ServerProcess) -> Iterator[None]:
    yield
    with RawMember(server.address, f"bystander-{uuid.uuid4().hex}") as other:
        assert other.ask(other.forward_frames(other.take_id()))[0] is grpc.StatusCode.OK
        other.leave()
