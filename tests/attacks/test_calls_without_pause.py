"""Calls as fast as they can be made: they come at the server's pace, and those that do not wait are refused with a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from kt_expert_proto.channel import RETRY_DELAY_KEY
from kt_expert_proto.header import Op
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from support.raw import RawMember
from support.server import ServerProcess
from support.tokens import bearer, write_tokens


@pytest.fixture(scope="module")
def slow_server(qwen3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One call a second, after four."""
    directory = tmp_path_factory.mktemp("slow")
    tokens = write_tokens(directory / "tokens", attacker="train", other="train")
    options = ("--calls-per-second", "1", "--token-file", str(tokens))
    with ServerProcess(qwen3_checkpoint, directory / "log", *options) as process:
        yield process


def status(channel: grpc.Channel, identity: str) -> grpc.Future:
    call = channel.unary_unary("/kt_expert.v1.Expert/GetStatus", pb.GetStatusRequest.SerializeToString)
    return call.future(pb.GetStatusRequest(), metadata=bearer(identity), timeout=60.0)


@pytest.mark.parametrize(("identity", "answer"), [("attacker", "OK"), ("stranger", "UNAUTHENTICATED")])
def test_many_at_once(slow_server: ServerProcess, identity: str, answer: str) -> None:
    with grpc.insecure_channel(slow_server.address) as channel:
        calls = [status(channel, identity) for _ in range(200)]
        refused = [call for call in calls if call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED]
        answered = [call for call in calls if call.code() is grpc.StatusCode[answer]]
        assert len(refused) + len(answered) == len(calls)
        assert refused
        assert len(answered) < 100  # four at once, ten that wait, and what time has given meanwhile
        assert int(dict(refused[0].trailing_metadata())[RETRY_DELAY_KEY]) > 0
        assert status(channel, "other").code() is grpc.StatusCode.OK


def test_another_protocol_is_told_to_those_who_may_come_in(slow_server: ServerProcess) -> None:
    with grpc.insecure_channel(slow_server.address) as channel:
        call = channel.unary_unary("/kt_expert.v1.Expert/Hello", pb.HelloRequest.SerializeToString)
        codes = {
            identity: call.future(pb.HelloRequest(), metadata=bearer(identity)).code() for identity in ("other", "stranger")
        }
    assert codes == {"other": grpc.StatusCode.FAILED_PRECONDITION, "stranger": grpc.StatusCode.UNAUTHENTICATED}


def test_refused_requests_are_slowed_down_too(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    """A stream that makes no mistakes is not."""
    with (
        ServerProcess(qwen3_checkpoint, tmp_path / "log", "--calls-per-second", "1") as server,
        RawMember(server.address) as raw,
    ):
        zero_grad = spb.RequestOpen(zero_grad=spb.ZeroGrad())
        for _ in range(300):
            assert raw.ask(raw.call_frames(Op.ZERO_GRAD, zero_grad))[0] is grpc.StatusCode.OK
        assert server.metric("kt_expert_paced_calls_total") == 0
        for _ in range(12):
            assert raw.ask(raw.call_frames(Op.SET_STEP, zero_grad))[0] is grpc.StatusCode.INVALID_ARGUMENT
        assert raw.ask(raw.call_frames(Op.ZERO_GRAD, zero_grad))[0] is grpc.StatusCode.OK
        assert server.metric("kt_expert_paced_calls_total") > 0
        raw.leave()
