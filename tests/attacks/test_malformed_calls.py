"""Messages that are none, to every service on the port: the sender's error, and not a line in the log."""

from __future__ import annotations

import grpc
import pytest
from kt_expert_proto.v1 import service_pb2
from support.server import ServerProcess

SERVICE = service_pb2.DESCRIPTOR.services_by_name["Expert"]
CONTROL = [f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods]
HALF_A_FIELD = b"\x0a\xff"


@pytest.mark.parametrize("method", [*CONTROL, "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"])
def test_one_message(server: ServerProcess, method: str) -> None:
    written = server.log.stat().st_size
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(method)(HALF_A_FIELD, timeout=30.0)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "the request cannot be read" in caught.value.details()
    assert server.log.stat().st_size == written


def test_a_call_that_is_generated_and_not_implemented(server: ServerProcess) -> None:
    written = server.log.stat().st_size
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/grpc.health.v1.Health/List")(b"", timeout=30.0)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert server.log.stat().st_size == written


def test_a_watch(server: ServerProcess) -> None:
    written = server.log.stat().st_size
    with grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            next(channel.unary_stream("/grpc.health.v1.Health/Watch")(HALF_A_FIELD, timeout=30.0))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert next(channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=30.0)) == b"\x08\x01"  # SERVING
    assert server.log.stat().st_size == written


def test_a_stream_of_them(server: ServerProcess) -> None:
    written = server.log.stat().st_size
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    list_services = b"\x3a\x00"
    with grpc.insecure_channel(server.address) as channel:
        answers = channel.stream_stream(method)(iter([list_services, HALF_A_FIELD]), timeout=30.0)
        assert b"kt_expert.v1.Expert" in next(answers)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert server.log.stat().st_size == written
