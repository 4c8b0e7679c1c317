"""What a stranger to the protocol can ask: health, reflection, and the server's own account of itself."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import kt_expert_client as kt
import kt_expert_native as native
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from kt_expert_client import LayerLora
from kt_expert_proto.v1 import service_pb2 as pb
from support.server import ServerProcess

TIMEOUT_S = 10.0


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as opened:
        yield opened


@pytest.mark.parametrize("service", ["", "kt_expert.v1.Expert"])
def test_health(channel: grpc.Channel, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_and_describes_the_service(channel: grpc.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="kt_expert.v1.Expert"),
    ]
    listed, described = stub.ServerReflectionInfo(iter(requests), timeout=TIMEOUT_S)
    assert "kt_expert.v1.Expert" in {service.name for service in listed.list_services_response.service}
    assert described.file_descriptor_response.file_descriptor_proto


def test_status_names_kernels_runs_and_memory(server: ServerProcess) -> None:
    with kt.connect(server.address) as client:
        run = client.open_run(lora=[LayerLora(1, rank_up=2, scale_up=1.0)])
        status = client.status()
        assert status.state == pb.SERVER_STATE_READY
        assert [(kernel.layer, kernel.weight_format) for kernel in status.kernels] == [(0, "bf16"), (1, "bf16"), (2, "bf16")]
        engine = native.Engine(1, client.isa)
        assert {(kernel.isa, kernel.kernel) for kernel in status.kernels} == {(client.isa, engine.kernel("bf16"))}
        assert all("the highest" in kernel.reason for kernel in status.kernels)
        ours = next(entry for entry in status.runs if entry.run == run.name)
        assert ours.adapter_bytes == 8 * 2 * (32 + 24) * 4
        assert [(member.rank, member.epoch, member.connected) for member in ours.members] == [(0, 1, True)]
        reserved = {entry.kind: entry.bytes for entry in status.memory}
        assert reserved["weights"] == 3 * native.LayerWeights.nbytes_of(native.LayerSpec(8, 32, 24))
        assert 0 < sum(reserved.values()) < status.memory_limit_bytes
