"""The control calls, which concern the server or a run and not a member."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import kt_expert_native as native
from kt_expert_proto.header import PROTOCOL_VERSION
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc

from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.edge.data_plane import DataPlane
from kt_expert_server.edge.driver import Driver
from kt_expert_server.edge.entrance import Entrance
from kt_expert_server.edge.same_host.listener import SameHost
from kt_expert_server.edge.status import CallGuard
from kt_expert_server.engine.budget import MemoryBudget
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import WrongPhase
from kt_expert_server.members import wire
from kt_expert_server.members.core import State
from kt_expert_server.members.run import Run
from kt_expert_server.model.index import LayerPlan
from kt_expert_server.model.kernel_choice import kernel_reason

Context = grpc.aio.ServicerContext[Any, Any]
Response = TypeVar("Response")
_WIRE_DTYPES = {"bf16": pb.WIRE_DTYPE_BF16, "fp32": pb.WIRE_DTYPE_FP32}
_STATES = {
    State.LOADING: pb.SERVER_STATE_LOADING,
    State.READY: pb.SERVER_STATE_READY,
    State.DRAINING: pb.SERVER_STATE_DRAINING,
}


class ControlService(service_pb2_grpc.ExpertServicer):
    """Every method asks the core and answers."""

    def __init__(
        self,
        driver: Driver,
        engine: native.Engine,
        budget: MemoryBudget,
        store: CheckpointStore | None,
        entrance: Entrance,
        guard: CallGuard,
        version: str,
        load_progress: Callable[[], float],
        on_drain: Callable[[], None],
        same_host: SameHost | None,
        data_plane: DataPlane | None,
    ) -> None:
        self._driver, self._core = driver, driver.core
        self._engine, self._budget, self._store = engine, budget, store
        self._entrance, self._guard, self._version = entrance, guard, version
        self._progress, self._on_drain = load_progress, on_drain
        self._same_host, self._data_plane = same_host, data_plane
        self._begun = time.monotonic()

    async def Hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloResponse:  # noqa: N802
        async def body() -> pb.HelloResponse:
            await self._entrance.trainer(context)
            if request.protocol_version != PROTOCOL_VERSION:
                raise WrongPhase(
                    f"the client speaks protocol {request.protocol_version}, this server {PROTOCOL_VERSION}; install "
                    "matching versions of kt-expert"
                )
            model, limits = self._core.model, self._core.limits
            return pb.HelloResponse(
                protocol_version=PROTOCOL_VERSION,
                server_version=self._version,
                state=_STATES[self._core.state],
                model_type=model.plan.model_type if model else "",
                model_digest=model.plan.digest if model else "",
                layers=[_layer_spec(layer) for layer in model.plan.layers] if model else [],
                isa=self._engine.isa,
                max_request_bytes=limits.max_request_bytes,
                max_tokens=limits.max_tokens,
                load_progress=self._progress(),
            )

        return await self._answer("Hello", context, body)

    async def CloseRun(self, request: pb.CloseRunRequest, context: Context) -> pb.CloseRunResponse:  # noqa: N802
        async def body() -> pb.CloseRunResponse:
            identity = (await self._entrance.trainer(context)).identity
            self._driver.do(lambda now: self._core.close_run(request.run, identity, now))
            return pb.CloseRunResponse()

        return await self._answer("CloseRun", context, body)

    async def ListCheckpoints(  # noqa: N802
        self, request: pb.ListCheckpointsRequest, context: Context
    ) -> pb.ListCheckpointsResponse:
        del request

        async def body() -> pb.ListCheckpointsResponse:
            identity, store = (await self._entrance.trainer(context)).identity, self._store
            if store is None:
                raise WrongPhase("this server has no place for checkpoints; start it with --state-dir DIR")
            found = await self._driver.on_disk(lambda: store.of_owner(identity))
            return pb.ListCheckpointsResponse(
                checkpoints=[
                    pb.Checkpoint(
                        name=name,
                        run=manifest.run,
                        step=manifest.step,
                        size_bytes=manifest.size_bytes,
                        automatic=manifest.automatic,
                    )
                    for name, manifest in found
                ]
            )

        return await self._answer("ListCheckpoints", context, body)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        del request

        async def body() -> pb.DrainResponse:
            await self._entrance.admin(context)
            self._driver.do(lambda _: self._core.drain())
            self._on_drain()
            return pb.DrainResponse()

        return await self._answer("Drain", context, body)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        del request

        async def body() -> pb.GetStatusResponse:
            return self._status((await self._entrance.trainer(context)).identity)

        return await self._answer("GetStatus", context, body)

    async def OfferSameHost(self, request: pb.SameHostRequest, context: Context) -> pb.SameHostOffer:  # noqa: N802
        del request

        async def body() -> pb.SameHostOffer:
            caller, same_host = await self._entrance.trainer(context), self._same_host
            if same_host is None:
                return pb.SameHostOffer(reason="the server was started with --same-host off, or could not make the directory")
            offer = same_host.offer(caller)
            return pb.SameHostOffer(socket_path=str(same_host.path), offer_id=offer.offer_id, secret=offer.secret)

        return await self._answer("OfferSameHost", context, body)

    async def OfferDataPlane(self, request: pb.DataPlaneRequest, context: Context) -> pb.DataPlaneOffer:  # noqa: N802
        del request

        async def body() -> pb.DataPlaneOffer:
            caller, plane = await self._entrance.trainer(context), self._data_plane
            if plane is None:
                return pb.DataPlaneOffer(reason="the server was started without --data-listen")
            offer = plane.offer(caller)
            return pb.DataPlaneOffer(host=plane.host, port=plane.port, offer_id=offer.offer_id, secret=offer.secret)

        return await self._answer("OfferDataPlane", context, body)

    def _status(self, identity: str) -> pb.GetStatusResponse:
        core, engine = self._core, self._engine
        layers = core.model.layers if core.model else {}
        return pb.GetStatusResponse(
            state=_STATES[core.state],
            uptime_s=time.monotonic() - self._begun,
            runs=[self._run_status(run) for run in core.runs.by_name.values() if run.owner == identity],
            kernels=[
                pb.KernelStatus(
                    layer=layer,
                    isa=engine.isa,
                    kernel=engine.kernel(loaded.weights.weight_format),
                    weight_format=loaded.weights.weight_format,
                    reason=_kernel_reason(engine, loaded.weights),
                )
                for layer, loaded in layers.items()
            ],
            memory=[pb.MemoryStatus(kind=kind.value, bytes=self._budget.reserved(kind)) for kind in Kind],
            memory_limit_bytes=self._budget.limit_bytes,
            threads=engine.threads,
            queue_depth=core.dispatch.depth,
        )

    def _run_status(self, run: Run) -> pb.RunStatus:
        now = time.monotonic()
        members = [
            pb.MemberStatus(
                rank=member.rank,
                epoch=member.epoch,
                connected=member.stream is not None,
                tickets=len(member.tickets),
                ticket_bytes=member.tickets.size_bytes,
                last_request_id=member.log.received,
                lease_left_s=member.lease.left_s(now) or 0.0,
            )
            for member in run.members.values()
        ]
        return pb.RunStatus(
            run=run.name,
            step=run.step,
            world_size=run.config.world_size,
            wire_dtype=_WIRE_DTYPES[run.config.wire_dtype],
            adapter_bytes=sum(adapter.nbytes for adapter in run.adapters.values()),
            moment_dtype=wire.MOMENT_NUMBERS[run.config.moment_dtype],
            tickets=wire.TICKET_NUMBERS[run.config.tickets],
            optimizer=next((each.optimizer for each in run.adapters.values() if each.optimizer), ""),
            members=members,
            memory_bytes=self._budget.owned(run.name),
            ephemeral=run.ephemeral,
            idle_s=0.0 if run.empty_since is None else now - run.empty_since,
        )

    async def _answer(self, method: str, context: Context, body: Callable[[], Awaitable[Response]]) -> Response:
        return await self._guard.unary(method, context, body)


def _layer_spec(plan: LayerPlan) -> pb.LayerSpec:
    return pb.LayerSpec(
        layer=plan.layer,
        num_experts=plan.num_experts,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        top_k=plan.top_k,
        activation=plan.activation.kind,
        alpha=plan.activation.alpha,
        limit=plan.activation.limit,
        has_bias=plan.has_bias,
    )


def _kernel_reason(engine: native.Engine, weights: native.LayerWeights) -> str:
    reason = kernel_reason(engine, weights.weight_format)
    if weights.placement_obstacle:
        reason += f"; its memory is not placed on its nodes ({weights.placement_obstacle})"
    return reason
