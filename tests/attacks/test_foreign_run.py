"""Another identity's run and checkpoints: whoever knows their names, and even the instance word, gets nothing of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from kt_expert_proto.header import Op
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from support.raw import RawMember
from support.server import ServerProcess
from support.tokens import bearer

NAMED = spb.CheckpointName(name="her-own")
SAVE, LOAD = spb.RequestOpen(save_checkpoint=NAMED), spb.RequestOpen(load_checkpoint=NAMED)


@pytest.fixture
def hers(guarded_server: ServerProcess) -> Iterator[RawMember]:
    with RawMember(guarded_server.address, "hers", identity="alice") as member:
        yield member
        assert member.ask(member.forward_frames(member.take_id()))[0] is grpc.StatusCode.OK  # she goes on as before
        member.leave()


@pytest.fixture
def mallory(guarded_server: ServerProcess) -> Iterator[RawMember]:
    with RawMember(guarded_server.address, "his", identity="bob", join=False) as member:
        yield member


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "PERMISSION_DENIED"),
        ({"takeover": True}, "PERMISSION_DENIED"),
        ({"epoch": 99}, "PERMISSION_DENIED"),
        ({"epoch": 99, "resume_only": True}, "NOT_FOUND"),
        ({"rank": 1}, "PERMISSION_DENIED"),
    ],
)
@pytest.mark.parametrize("knows_the_word", [False, True])
def test_joining_it(hers: RawMember, mallory: RawMember, fields: dict[str, Any], code: str, *, knows_the_word: bool) -> None:
    if knows_the_word:
        mallory.instance = hers.instance
    with pytest.raises(grpc.RpcError) as caught:
        mallory.join(run="hers", **fields)
    assert caught.value.code() is grpc.StatusCode[code]


def test_closing_it(guarded_server: ServerProcess, hers: RawMember) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        hers.stub.CloseRun(pb.CloseRunRequest(run="hers"), metadata=bearer("bob"), timeout=60.0)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_looking_at_it(guarded_server: ServerProcess, hers: RawMember) -> None:
    status = hers.stub.GetStatus(pb.GetStatusRequest(), metadata=bearer("bob"), timeout=60.0)
    assert "hers" not in {run.run for run in status.runs}
    assert "hers" not in guarded_server.get("/metrics")[1]


def test_its_checkpoints(hers: RawMember, mallory: RawMember) -> None:
    assert hers.ask(hers.call_frames(Op.SAVE_CHECKPOINT, SAVE))[0] is grpc.StatusCode.OK
    mallory.join()
    loaded = mallory.ask(mallory.call_frames(Op.LOAD_CHECKPOINT, LOAD))
    assert loaded[0] is grpc.StatusCode.PERMISSION_DENIED
    saved = mallory.ask(mallory.call_frames(Op.SAVE_CHECKPOINT, SAVE))
    assert saved[0] is grpc.StatusCode.ALREADY_EXISTS
    listed = mallory.stub.ListCheckpoints(pb.ListCheckpointsRequest(), metadata=bearer("bob"), timeout=60.0)
    assert not listed.checkpoints
    mallory.leave()
    assert hers.ask(hers.call_frames(Op.LOAD_CHECKPOINT, LOAD))[0] is grpc.StatusCode.OK
