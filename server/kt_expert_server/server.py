"""Puts one server together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kt_expert_proto.frame import MAX_MESSAGE_BYTES
from kt_expert_proto.v1 import service_pb2, service_pb2_grpc

from kt_expert_server.api.control import ControlService
from kt_expert_server.api.status import CallGuard
from kt_expert_server.api.stream import SessionStreams
from kt_expert_server.config import Address, ServerConfig
from kt_expert_server.errors import ListenError, ServerUnavailable
from kt_expert_server.model.index import ModelPlan
from kt_expert_server.model.loader import BaseModel, load_model, resident_bytes, shown_format
from kt_expert_server.model.memory_plan import RUNTIME_BYTES
from kt_expert_server.observe.http import ObserveServer
from kt_expert_server.observe.metrics import Metrics
from kt_expert_server.runtime.checkpoints import Checkpoints
from kt_expert_server.runtime.compute import Compute
from kt_expert_server.runtime.engine_queue import EngineQueue
from kt_expert_server.runtime.memory import Kind, MemoryBudget
from kt_expert_server.runtime.registry import Registry, State
from kt_expert_server.store.checkpoint import CheckpointStore

_log = logging.getLogger(__name__)
SERVICE_NAME = service_pb2.DESCRIPTOR.services_by_name["Expert"].full_name
_LEASE_CHECKS = 3  # a lease ends at most a third of its length late
_STREAM_GRACE_S = 2.0  # for the last words to reach trainers after a drain
_ACKNOWLEDGE_POLL_S = 0.02
_GRPC_OPTIONS = (
    ("grpc.max_receive_message_length", 8 * MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 8 * MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # on by default, and then two servers silently share a port
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),  # a trainer's host that lost its power must lose its stream, and then its lease
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_concurrent_streams", 256),
)


class _StoppedWhileLoadingError(Exception):
    pass


def _warn_of_misplaced(model: BaseModel) -> None:
    obstacles = [layer.weights.placement_obstacle for layer in model.layers.values() if layer.weights.placement_obstacle]
    if obstacles:
        _log.warning("memory of %d layers is not on the nodes it was asked for: %s", len(obstacles), obstacles[0])


class Server:
    """One process: a gRPC port, a metrics port, one engine, one base model."""

    def __init__(self, config: ServerConfig, plan: ModelPlan) -> None:
        self._config = config
        self._plan = plan
        self._queue = EngineQueue(config.placement.engine(config.threads, config.isa))
        self._budget = MemoryBudget(config.memory_limit_bytes, self._queue.engine)
        self._budget.record(Kind.RUNTIME, RUNTIME_BYTES)
        self._registry = Registry(self._budget, config.limits, config.threads)
        self._version = version("kt-expert")
        self._metrics = Metrics(self._version, self._queue.engine.isa, shown_format(plan, config.weight_format))
        self._compute = Compute(self._registry, self._queue, self._metrics)
        store = CheckpointStore(config.state_dir) if config.state_dir is not None else None
        if store is not None:
            store.prepare()
        self._checkpoints = Checkpoints(self._registry, self._queue, store, self._metrics)
        self._observe = ObserveServer(self._registry, lambda: self._metrics.render(self._registry, self._queue))
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # present; the stubs lack it
        self._loaded_bytes = 0
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, on_loaded_bytes: Callable[[int], None], on_ready: Callable[[Address, Address], None]) -> None:
        """Serves until SIGTERM or SIGINT, then drains. Raises ListenError or ModelError before it is ready."""
        self._install_signals()
        self._registry.on_drain(lambda: self._background(self._set_health(serving=False)))
        metrics_address = await self._observe.start(self._config.metrics_listen)
        grpc_server, grpc_address = await self._start_grpc()
        leases = asyncio.ensure_future(self._expire_leases())
        try:
            model = await self._load(on_loaded_bytes)
            if model is not None:
                _warn_of_misplaced(model)
                self._registry.become_ready(model)
                await self._set_health(serving=self._registry.state is State.READY)
                on_ready(grpc_address, metrics_address)
                await self._stop.wait()
            await self._drain(grpc_server)
        finally:
            leases.cancel()
            await grpc_server.stop(0)
            await self._observe.stop()
            self._queue.close()

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            _log.warning("second signal: stopping at once")
            sys.stderr.flush()
            os._exit(1)
        self._stop.set()

    async def _start_grpc(self) -> tuple[grpc.aio.Server, Address]:
        server = grpc.aio.server(options=_GRPC_OPTIONS)
        service_pb2_grpc.add_ExpertServicer_to_server(self._control_service(), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        server.add_generic_rpc_handlers((SessionStreams(self._registry, self._compute, self._metrics),))
        address = self._config.listen
        try:
            port = server.add_insecure_port(str(address))
        except RuntimeError as error:
            raise ListenError(f"cannot listen for gRPC on {address}: is the port in use?") from error
        await self._set_health(serving=False)
        await server.start()
        return server, Address(address.host, port)

    def _control_service(self) -> ControlService:
        return ControlService(
            self._registry,
            self._compute,
            self._queue,
            self._checkpoints,
            CallGuard(self._metrics),
            self._version,
            lambda: self._loaded_bytes / max(1, self._plan.bf16_bytes),
        )

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME):
            await self._health.set(name, status)

    async def _load(self, on_loaded_bytes: Callable[[int], None]) -> BaseModel | None:
        """None where the server was told to stop meanwhile."""
        weight_format = self._config.weight_format
        nodes = self._config.placement.nodes
        self._budget.reserve(Kind.WEIGHTS, resident_bytes(self._plan, weight_format, nodes), "the model")

        def progress(size_bytes: int) -> None:
            if self._stop.is_set():
                raise _StoppedWhileLoadingError
            self._loaded_bytes += size_bytes
            on_loaded_bytes(size_bytes)

        try:
            return await asyncio.get_running_loop().run_in_executor(
                None, load_model, self._plan, weight_format, progress, self._config.placement
            )
        except _StoppedWhileLoadingError:
            return None

    async def _expire_leases(self) -> None:
        while True:
            await asyncio.sleep(self._config.limits.lease_s / _LEASE_CHECKS)
            for member in self._registry.expire():
                _log.info("rank %d of run %s lost its lease", member.rank, member.run.name)

    async def _drain(self, grpc_server: grpc.aio.Server) -> None:
        """Stops accepting, finishes what was accepted, lets the outcomes leave."""
        self._registry.stop()
        await self._health.enter_graceful_shutdown()
        _log.info("draining: %d members are joined", len(self._registry.members))
        deadline = time.monotonic() + self._config.shutdown_timeout_s
        if not await self._registry.wait_idle(self._config.shutdown_timeout_s):
            _log.warning("requests were still running after %g s and are abandoned", self._config.shutdown_timeout_s)
        while any(member.outcomes for member in self._registry.members if member.sink) and time.monotonic() < deadline:
            await asyncio.sleep(_ACKNOWLEDGE_POLL_S)
        for member in self._registry.members:
            if member.sink is not None:
                member.sink.close(ServerUnavailable("the server has finished its work and is stopping"))
        await grpc_server.stop(_STREAM_GRACE_S)
