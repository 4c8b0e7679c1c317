"""No token, another's, half of one, one of another scope: at every door of the port the same answer."""

from __future__ import annotations

import grpc
import pytest
from kt_expert_proto.channel import SESSION_METHOD
from kt_expert_proto.v1 import service_pb2
from support.raw import RawMember
from support.server import ServerProcess
from support.tokens import bearer, token_of

SERVICE = service_pb2.DESCRIPTOR.services_by_name["Expert"]
METHODS = [method.name for method in SERVICE.methods]
WRONG = {
    "none": [],
    "another scheme": [("authorization", f"Basic {token_of('alice')}")],
    "no scheme": [("authorization", token_of("alice"))],
    "unknown": bearer("mallory"),
    "half": [("authorization", f"Bearer {token_of('alice')[:-1]}")],
    "with more behind it": [("authorization", f"Bearer {token_of('alice')} ")],
    "the identity": [("authorization", "Bearer alice")],
    "another header": [("x-authorization", f"Bearer {token_of('alice')}")],
}


@pytest.mark.parametrize("metadata", WRONG.values(), ids=WRONG.keys())
@pytest.mark.parametrize("method", [*METHODS, "the stream"])
def test_every_door(guarded_server: ServerProcess, method: str, metadata: list[tuple[str, str]]) -> None:
    with grpc.insecure_channel(guarded_server.address) as channel:
        if method == "the stream":
            answers = channel.stream_stream(SESSION_METHOD)(iter([b"JOIN"]), metadata=metadata, timeout=60.0)
        else:
            answers = channel.unary_stream(f"/{SERVICE.full_name}/{method}")(b"", metadata=metadata, timeout=60.0)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert token_of("alice") not in caught.value.details()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "Drain"])
def test_a_token_that_may_not_train(guarded_server: ServerProcess, method: str) -> None:
    metadata = bearer("root")
    with grpc.insecure_channel(guarded_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE.full_name}/{method}")(b"", metadata=metadata, timeout=60.0)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(("name", "code"), [("root", "PERMISSION_DENIED"), ("mallory", "UNAUTHENTICATED")])
def test_joining(guarded_server: ServerProcess, name: str, code: str) -> None:
    with RawMember(guarded_server.address, join=False, identity=name) as raw:
        with pytest.raises(grpc.RpcError) as caught:
            raw.join()
        assert caught.value.code() is grpc.StatusCode[code]


def test_a_token_that_may_not_administer(guarded_server: ServerProcess) -> None:
    metadata = bearer("alice")
    with grpc.insecure_channel(guarded_server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE.full_name}/Drain")(b"", metadata=metadata, timeout=60.0)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with RawMember(guarded_server.address, "still-open", identity="alice") as raw:
        raw.leave()
