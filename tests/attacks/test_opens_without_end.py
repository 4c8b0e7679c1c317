"""Runs, ranks and streams without end: each has its bound."""

from __future__ import annotations

import uuid
from contextlib import ExitStack

import grpc
import pytest
from kt_expert_server.members.limits import Limits
from support.raw import RawMember
from support.server import ServerProcess


def test_members(server: ServerProcess) -> None:
    with ExitStack() as stack:
        refused = None
        for _ in range(Limits().max_members + 1):
            raw = stack.enter_context(RawMember(server.address, f"many-{uuid.uuid4().hex}", join=False))
            try:
                raw.join()
                stack.callback(raw.leave)
            except grpc.RpcError as error:
                refused = error
                break
        assert refused is not None
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the limit is 64" in refused.details()


def test_a_run_that_reserves_more_than_there_is(server: ServerProcess) -> None:
    from kt_expert_proto.v1 import service_pb2 as pb

    lora = [pb.LayerLora(layer=layer, rank_gate=4096, rank_up=4096, rank_down=4096) for layer in range(3)]
    config = pb.RunConfig(world_size=1024, wire_dtype=pb.WIRE_DTYPE_FP32, lora=lora)
    with RawMember(server.address, "greedy", join=False) as raw:
        with pytest.raises(grpc.RpcError) as caught:
            raw.join(config=config)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
