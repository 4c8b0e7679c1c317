"""Names that are paths: of runs and of checkpoints."""

from __future__ import annotations

import grpc
import pytest
from kt_expert_proto.header import Op
from kt_expert_proto.v1 import session_pb2 as spb
from support.raw import RawMember
from support.server import ServerProcess

NAMES = ["../outside", "/etc/passwd", "a/b", "..", ".hidden", "a\x00b", "a" * 129, ""]


@pytest.mark.parametrize("name", NAMES)
def test_of_checkpoints(attacker: RawMember, name: str) -> None:
    for op, field in ((Op.SAVE_CHECKPOINT, "save_checkpoint"), (Op.LOAD_CHECKPOINT, "load_checkpoint")):
        opened = spb.RequestOpen(**{field: spb.CheckpointName(name=name)})
        code, message = attacker.ask(attacker.call_frames(op, opened))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "is not allowed" in message


@pytest.mark.parametrize("name", NAMES)
def test_of_runs(server: ServerProcess, name: str) -> None:
    with RawMember(server.address, "unused", join=False) as raw:
        with pytest.raises(grpc.RpcError) as caught:
            raw.join(run=name)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
