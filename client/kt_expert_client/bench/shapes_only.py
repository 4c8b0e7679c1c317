"""A server that holds shapes only: it takes everything, keeps nothing and answers at once with zeros. So what is measured is
the trainer's side alone, on models that no machine at hand holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from kt_expert_proto.v1 import service_pb2 as service
from kt_expert_proto.v1 import session_pb2 as pb

from kt_expert_client.connection import Client
from kt_expert_client.offload import LocalLayerSpec
from kt_expert_client.options import RunOptions
from kt_expert_client.profile.recorder import Recorder
from kt_expert_client.run import Run, memory_of
from kt_expert_client.session.actions import JoinTerms
from kt_expert_client.session.calls import Call
from kt_expert_client.session.driver import Pending, Session
from kt_expert_client.staging import Staging

_INSTANCE = "shapesonly000000"


class ShapesOnlySession:
    """Stands for Session. `requests` counts what was submitted."""

    keeps_requests = False

    def __init__(self, staging: Staging) -> None:
        self.core = SimpleNamespace(joined=pb.Joined(created=True))
        self.requests = 0
        self._memory = memory_of(staging)

    def submit(self, call: Call) -> Pending:
        self.requests += 1
        call.request_id = self.requests
        pending = Pending(call)
        call.head = pb.ResultHead(created=True, norm=1.0)
        if call.opened.HasField("grad_norm"):
            count = sum(each.tensors.bit_count() * len(each.layers) for each in call.opened.grad_norm.sets)
            call.head.norms.extend([1.0] * count)
        if call.opened.HasField("step"):
            call.head.step = call.opened.step.step
        pending.results = {tensor: self._memory(size, call) for tensor, size in call.expects.items()}
        for buffer in pending.results.values():
            buffer.view[:] = bytes(len(buffer.view))
        if call.on_unneeded is not None:
            call.on_unneeded(call)
        pending.done.set()
        return pending

    def release(self, ticket: int) -> None:
        """Nothing was kept."""

    def leave(self) -> None:
        """Nobody is there to be told."""


class ShapesOnlyClient:
    """Stands for Client: its runs have a session of the kind above."""

    address = "nowhere"

    def __init__(self, model_type: str, specs: list[LocalLayerSpec], top_k: int) -> None:
        self.model_type = model_type
        self.layers = {
            spec.layer: service.LayerSpec(
                layer=spec.layer, num_experts=spec.num_experts, hidden_size=spec.hidden_size,
                intermediate_size=spec.intermediate_size, activation=spec.activation, has_bias=spec.has_bias, top_k=top_k,
            )
            for spec in specs
        }  # fmt: skip
        self.sessions: list[ShapesOnlySession] = []

    def unique_run_name(self, name: str) -> str:
        return name

    def open_run(self, name: str | None = None, *, wire_dtype: str, options: RunOptions, **_: Any) -> Run:
        del name, options
        staging = Staging()
        session = ShapesOnlySession(staging)
        self.sessions.append(session)
        config = service.RunConfig(world_size=1)
        terms = JoinTerms("shapes-only", config, True, 0, _INSTANCE)
        top_k = {layer: spec.top_k for layer, spec in self.layers.items()}
        return Run(cast("Session", session), staging, terms, wire_dtype, top_k, lambda _: None, Recorder())


def as_client(stand_in: ShapesOnlyClient) -> Client:
    """For callers that are written for the real one."""
    return cast("Client", stand_in)
