"""The control calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import grpc
import kt_expert_native as native
from kt_expert_proto.frame import MAX_PAYLOAD_BYTES, PROTOCOL_VERSION
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc

from kt_expert_server.api import convert
from kt_expert_server.api.status import CallGuard
from kt_expert_server.errors import InvalidRequest, WrongPhase
from kt_expert_server.model.kernel_choice import kernel_reason
from kt_expert_server.runtime.adapter_io import AdapterWriter, stored_tensors
from kt_expert_server.runtime.checkpoints import Checkpoints
from kt_expert_server.runtime.compute import Compute
from kt_expert_server.runtime.engine_queue import EngineQueue
from kt_expert_server.runtime.memory import Kind
from kt_expert_server.runtime.registry import Registry, initialise
from kt_expert_server.runtime.run import Member, Run

Context = grpc.aio.ServicerContext[Any, Any]
Response = TypeVar("Response")


class ControlService(service_pb2_grpc.ExpertServicer):
    """Every method validates, calls the runtime, and answers."""

    def __init__(
        self,
        registry: Registry,
        compute: Compute,
        queue: EngineQueue,
        checkpoints: Checkpoints,
        guard: CallGuard,
        version: str,
        load_progress: Callable[[], float],
    ) -> None:
        self._registry = registry
        self._compute = compute
        self._queue = queue
        self._checkpoints = checkpoints
        self._guard = guard
        self._version = version
        self._progress = load_progress
        self._begun = time.monotonic()

    async def Hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloResponse:  # noqa: N802
        async def body() -> pb.HelloResponse:
            if request.protocol_version != PROTOCOL_VERSION:
                raise WrongPhase(
                    f"the client speaks protocol {request.protocol_version}, this server {PROTOCOL_VERSION}; install "
                    "matching versions of kt-expert"
                )
            model = self._registry.model
            limits = self._registry.limits
            return pb.HelloResponse(
                protocol_version=PROTOCOL_VERSION,
                server_version=self._version,
                state=convert.STATES[self._registry.state],
                model_type=model.plan.model_type if model else "",
                model_digest=model.plan.digest if model else "",
                layers=[convert.layer_spec(layer) for layer in model.plan.layers] if model else [],
                isa=self._queue.engine.isa,
                max_request_bytes=limits.max_request_bytes,
                max_tokens=limits.max_tokens,
                load_progress=self._progress(),
            )

        return await self._answer("Hello", context, body)

    async def OpenRun(self, request: pb.OpenRunRequest, context: Context) -> pb.OpenRunResponse:  # noqa: N802
        async def body() -> pb.OpenRunResponse:
            run, created = self._registry.open_run(request.run, convert.run_config(request.config), request.ephemeral)
            if created:
                async with self._queue.turn():
                    await self._queue.run(lambda: initialise(run))
            return pb.OpenRunResponse(created=created, step=run.step)

        return await self._answer("OpenRun", context, body)

    async def JoinRun(self, request: pb.JoinRunRequest, context: Context) -> pb.JoinRunResponse:  # noqa: N802
        async def body() -> pb.JoinRunResponse:
            member = self._registry.join(request.run, request.rank, request.resume_member)
            limits = self._registry.limits
            return pb.JoinRunResponse(
                member=member.token,
                epoch=member.epoch,
                credit_requests=limits.credit_requests,
                credit_bytes=limits.credit_bytes,
                last_request_id=member.last_request_id,
                lease_s=limits.lease_s,
                step=member.run.step,
                norm_sequence=member.run.norm_barrier.completed,
            )

        return await self._answer("JoinRun", context, body)

    async def LeaveRun(self, request: pb.MemberRequest, context: Context) -> pb.LeaveRunResponse:  # noqa: N802
        async def body() -> pb.LeaveRunResponse:
            self._registry.leave(self._registry.member(request.member))
            return pb.LeaveRunResponse()

        return await self._answer("LeaveRun", context, body)

    async def CloseRun(self, request: pb.CloseRunRequest, context: Context) -> pb.CloseRunResponse:  # noqa: N802
        async def body() -> pb.CloseRunResponse:
            self._registry.close(self._registry.run_named(request.run))
            return pb.CloseRunResponse()

        return await self._answer("CloseRun", context, body)

    async def GradNorm(self, request: pb.GradNormRequest, context: Context) -> pb.GradNormResponse:  # noqa: N802
        async def body() -> pb.GradNormResponse:
            member = self._registry.member(request.member)
            timeout = convert.timeout_s(request.timeout_s, self._registry.limits.max_barrier_s)
            await self._compute.wait_for_request(member, request.after_request_id, timeout)
            norm = await member.run.norm_barrier.arrive(
                member.rank, request.sequence, None, timeout, lambda _: self._compute.grad_norm(member.run)
            )
            return pb.GradNormResponse(norm=norm)

        return await self._answer("GradNorm", context, body)

    async def Step(self, request: pb.StepRequest, context: Context) -> pb.StepResponse:  # noqa: N802
        async def body() -> pb.StepResponse:
            member = self._registry.member(request.member)
            timeout = convert.timeout_s(request.timeout_s, self._registry.limits.max_barrier_s)
            params = convert.step_params(request)
            await self._compute.wait_for_request(member, request.after_request_id, timeout)
            step = await member.run.step_barrier.arrive(
                member.rank, request.step, params, timeout, lambda said: self._compute.step(member.run, said)
            )
            return pb.StepResponse(step=step)

        return await self._answer("Step", context, body)

    async def ZeroGrad(self, request: pb.MemberRequest, context: Context) -> pb.ZeroGradResponse:  # noqa: N802
        async def body() -> pb.ZeroGradResponse:
            member = self._registry.member(request.member)
            await self._wait(member, request.after_request_id)
            member.close_window()
            return pb.ZeroGradResponse()

        return await self._answer("ZeroGrad", context, body)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: Context) -> AsyncIterator[pb.AdapterChunk]:  # noqa: N802
        async def body() -> AsyncIterator[pb.AdapterChunk]:
            run = self._registry.run_named(request.run)
            for tensor, live in stored_tensors(run, request.parameters, request.moments):
                with self._registry.budget.held(Kind.REQUESTS, live.copy_bytes, f"a copy of {tensor}"):
                    async with self._queue.turn():  # nothing changes it meanwhile
                        values = live.read().tobytes()
                    for offset in range(0, len(values), MAX_PAYLOAD_BYTES):
                        yield pb.AdapterChunk(
                            run=run.name,
                            layer=tensor.layer,
                            tensor=tensor.tensor,
                            part=convert.PARTS[tensor.part],
                            shape=live.shape,
                            offset=offset,
                            data=values[offset : offset + MAX_PAYLOAD_BYTES],
                            step=run.step,
                        )

        async for chunk in self._guard.stream("GetAdapter", context, body):
            yield chunk

    async def PutAdapter(  # noqa: N802
        self, requests: AsyncIterator[pb.AdapterChunk], context: Context
    ) -> pb.PutAdapterResponse:
        async def body() -> pb.PutAdapterResponse:
            writer: AdapterWriter | None = None
            run, moments_step = None, None
            with ExitStack() as held:
                async for chunk in requests:
                    if writer is None or run is None:
                        run = self._registry.run_named(chunk.run)
                        writer = AdapterWriter(run, self._registry.loaded_model())
                    if len(chunk.data) > MAX_PAYLOAD_BYTES:
                        raise InvalidRequest(f"a piece of {len(chunk.data)} bytes, at most {MAX_PAYLOAD_BYTES} are taken")
                    tensor = convert.tensor_id(chunk)
                    if tensor.part != "parameter":
                        if moments_step is None:
                            held.enter_context(run.step_barrier.held("moments are being replaced"))
                        moments_step = chunk.step
                    # Inside a turn of the engine: no forward reads a tensor while it is replaced.
                    async with self._queue.turn():
                        writer.write(tensor, tuple(chunk.shape), chunk.offset, chunk.data, chunk.step)
                if writer is None or run is None:
                    raise InvalidRequest("PutAdapter got no tensors")
                writer.finish()
                if moments_step is not None:
                    run.step_barrier.restart(moments_step)
            return pb.PutAdapterResponse(tensors=writer.tensors)

        return await self._answer("PutAdapter", context, body)

    async def SaveCheckpoint(  # noqa: N802
        self, request: pb.CheckpointRequest, context: Context
    ) -> AsyncIterator[pb.CheckpointProgress]:
        async for message in self._guard.stream(
            "SaveCheckpoint", context, lambda: self._checkpoint_progress(self._checkpoints.save, request)
        ):
            yield message

    async def LoadCheckpoint(  # noqa: N802
        self, request: pb.CheckpointRequest, context: Context
    ) -> AsyncIterator[pb.CheckpointProgress]:
        async for message in self._guard.stream(
            "LoadCheckpoint", context, lambda: self._checkpoint_progress(self._checkpoints.load, request)
        ):
            yield message

    async def _checkpoint_progress(
        self, operation: Callable[..., Awaitable[str]], request: pb.CheckpointRequest
    ) -> AsyncIterator[pb.CheckpointProgress]:
        run = self._registry.run_named(request.run)
        loop = asyncio.get_running_loop()
        reports: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()

        def report(done: int, total: int) -> None:
            loop.call_soon_threadsafe(reports.put_nowait, (done, total))

        task = asyncio.ensure_future(operation(run, request.name, report))

        def ended(done: asyncio.Future[str]) -> None:
            if not done.cancelled():
                done.exception()  # looked at here too: the operation goes on where its caller is gone
            reports.put_nowait(None)

        task.add_done_callback(ended)
        done = total = 0
        while (report_now := await reports.get()) is not None:
            done, total = report_now
            yield pb.CheckpointProgress(done_bytes=done, total_bytes=total)
        yield pb.CheckpointProgress(done_bytes=done, total_bytes=total, digest=await task)

    async def ListCheckpoints(  # noqa: N802
        self, request: pb.ListCheckpointsRequest, context: Context
    ) -> pb.ListCheckpointsResponse:
        del request

        async def body() -> pb.ListCheckpointsResponse:
            found = [
                pb.Checkpoint(name=name, run=manifest.run, step=manifest.step, size_bytes=manifest.size_bytes)
                for name, manifest in self._checkpoints.list()
            ]
            return pb.ListCheckpointsResponse(checkpoints=found)

        return await self._answer("ListCheckpoints", context, body)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:  # noqa: N802
        del request

        async def body() -> pb.DrainResponse:
            self._registry.drain()
            return pb.DrainResponse()

        return await self._answer("Drain", context, body)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:  # noqa: N802
        del request

        async def body() -> pb.GetStatusResponse:
            return self._status()

        return await self._answer("GetStatus", context, body)

    def _status(self) -> pb.GetStatusResponse:
        registry, engine = self._registry, self._queue.engine
        layers = registry.model.layers if registry.model else {}
        return pb.GetStatusResponse(
            state=convert.STATES[registry.state],
            uptime_s=time.monotonic() - self._begun,
            runs=[_run_status(run) for run in registry.runs.values()],
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
            memory=[pb.MemoryStatus(kind=kind.value, bytes=registry.budget.reserved(kind)) for kind in Kind],
            memory_limit_bytes=registry.budget.limit_bytes,
            threads=engine.threads,
            queue_depth=self._queue.depth,
        )

    async def _wait(self, member: Member, request_id: int) -> None:
        await self._compute.wait_for_request(member, request_id, self._registry.limits.max_barrier_s)

    async def _answer(self, method: str, context: Context, body: Callable[[], Awaitable[Response]]) -> Response:
        return await self._guard.unary(method, context, body)


def _run_status(run: Run) -> pb.RunStatus:
    members = [
        pb.MemberStatus(
            rank=member.rank,
            epoch=member.epoch,
            connected=member.sink is not None,
            tickets=len(member.tickets),
            ticket_bytes=sum(saved.size_bytes for saved in member.tickets.values()),
            last_request_id=member.last_request_id,
        )
        for member in run.members.values()
    ]
    return pb.RunStatus(
        run=run.name,
        step=run.step,
        world_size=run.config.world_size,
        wire_dtype=convert.WIRE_DTYPES[run.config.wire_dtype],
        adapter_bytes=run.adapter_bytes,
        moment_dtype=convert.MOMENTS[run.config.moment_dtype],
        tickets=convert.TICKETS[run.config.tickets],
        optimizer=run.optimizer,
        members=members,
    )


def _kernel_reason(engine: native.Engine, weights: native.LayerWeights) -> str:
    reason = kernel_reason(engine, weights.weight_format)
    if weights.placement_obstacle:
        reason += f"; its memory is not placed on its nodes ({weights.placement_obstacle})"
    return reason
