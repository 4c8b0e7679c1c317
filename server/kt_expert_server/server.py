"""Puts one server together and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any

import grpc
import kt_expert_native as native
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kt_expert_proto.channel import SERVER_OPTIONS
from kt_expert_proto.v1 import service_pb2, service_pb2_grpc

from kt_expert_server.checkpoints.filesystem import LocalFilesystem
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.config import Address, ServerConfig
from kt_expert_server.edge.accepting import Parts
from kt_expert_server.edge.auth import Authenticator
from kt_expert_server.edge.control import ControlService
from kt_expert_server.edge.data_plane import DataPlane
from kt_expert_server.edge.driver import Driver
from kt_expert_server.edge.entrance import Entrance
from kt_expert_server.edge.grpc_stream import SessionStreams
from kt_expert_server.edge.http import ObserveServer
from kt_expert_server.edge.listening import bind, check_security, is_loopback
from kt_expert_server.edge.pace import Pace
from kt_expert_server.edge.parsing import Parsing
from kt_expert_server.edge.same_host.listener import SameHost
from kt_expert_server.edge.status import CallGuard
from kt_expert_server.engine.budget import MemoryBudget
from kt_expert_server.engine.buffers import BufferPool
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.passes import Tools
from kt_expert_server.engine.quotas import Quotas
from kt_expert_server.errors import ListenError
from kt_expert_server.members.core import ServerCore, State
from kt_expert_server.model.index import ModelPlan
from kt_expert_server.model.loader import BaseModel, load_model, resident_bytes, shown_format
from kt_expert_server.model.memory_plan import RUNTIME_BYTES
from kt_expert_server.observe.metrics import Metrics

_log = logging.getLogger(__name__)
SERVICE_NAME = service_pb2.DESCRIPTOR.services_by_name["Expert"].full_name
_LAST_CHECKPOINT_S = 30.0  # for the state of runs that changed since their last checkpoint, beside --shutdown-timeout
_STREAM_GRACE_S = 2.0  # for the last words to reach trainers after a drain
_SERVER = "the server"  # owner of what belongs to no run


class _StoppedWhileLoadingError(Exception):
    pass


def _warn_of_misplaced(model: BaseModel) -> None:
    obstacles = [layer.weights.placement_obstacle for layer in model.layers.values() if layer.weights.placement_obstacle]
    if obstacles:
        _log.warning("memory of %d layers is not on the nodes it was asked for: %s", len(obstacles), obstacles[0])


class Server:
    """One process: a gRPC port, a metrics port, one engine, one base model. Made inside the event loop."""

    def __init__(self, config: ServerConfig, plan: ModelPlan) -> None:
        self._config = config
        self._plan = plan
        engine, pool = config.placement.engine(config.threads, config.isa), BufferPool()
        self._budget = MemoryBudget(config.memory_limit_bytes, (engine, pool), Quotas(config.limits.quotas))
        self._budget.record(Kind.RUNTIME, RUNTIME_BYTES, _SERVER)
        self._version = version("kt-expert")
        self._metrics = Metrics(self._version, engine.isa, shown_format(plan, config.weight_format))
        self._tools = Tools(engine, self._budget, pool, self._metrics)
        self._store = None if config.state_dir is None else CheckpointStore(LocalFilesystem.create(config.state_dir))
        if self._store is not None:
            self._store.prepare()
        self._core = ServerCore(self._tools, config.limits, self._store)
        gate = native.Gate()
        self._driver = Driver(self._core, self._metrics, gate)
        check_security(config.listen, config.security)
        tokens = config.security.token_file
        authenticator = Authenticator() if tokens is None else Authenticator.from_file(tokens)
        self._entrance = Entrance(authenticator, Pace(config.calls_per_second, self._metrics.paced))
        parts = Parts(self._driver, self._metrics, self._entrance.pace, self._budget, pool, engine, gate)
        self._same_host, self._data_plane = self._make_same_host(parts), self._make_data_plane(parts)
        self._observe = ObserveServer(
            lambda: self._core.state, lambda: self._metrics.render(self._core, self._budget, engine.threads)
        )
        self._health: Any = health.aio.HealthServicer()  # type: ignore[attr-defined]  # present; the stubs lack it
        self._loaded_bytes = 0
        self._stop = asyncio.Event()
        self._stop_loading = threading.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(
        self, on_loaded_bytes: Callable[[int], None], on_ready: Callable[[Address, Address, Address | None], None]
    ) -> None:  # fmt: skip
        """Serves until SIGTERM or SIGINT, then drains. Raises ListenError or ModelError before it is ready."""
        self._install_signals()
        metrics_address = await self._observe.start(self._config.metrics_listen)
        try:
            for beside in self._beside_grpc():  # before gRPC, which offers them
                beside.start()
            grpc_server, grpc_address = await self._start_grpc()
            try:
                model = await self._load(on_loaded_bytes)
                if model is not None:
                    _warn_of_misplaced(model)
                    self._driver.do(lambda _: self._core.become_ready(model))
                    await self._set_health(serving=self._core.state is State.READY)
                    data_address = self._data_plane.address if self._data_plane is not None else None
                    on_ready(grpc_address, metrics_address, data_address)
                    await self._stop.wait()
                await self._drain(grpc_server)
            finally:
                await grpc_server.stop(0)
        finally:
            for beside in self._beside_grpc():
                await beside.stop()
            await self._observe.stop()
            self._driver.close()

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
        self._stop_loading.set()

    async def _start_grpc(self) -> tuple[grpc.aio.Server, Address]:
        server = grpc.aio.server(options=SERVER_OPTIONS, interceptors=(Parsing(self._entrance.pace),))
        guard = CallGuard(self._metrics)
        service_pb2_grpc.add_ExpertServicer_to_server(self._control_service(guard), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.security.reflection or is_loopback(self._config.listen):
            names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        streams = SessionStreams(self._driver, self._entrance, self._metrics)
        server.add_generic_rpc_handlers((streams,))
        bound = bind(server, self._config.listen, self._config.security)
        await self._set_health(serving=False)
        await server.start()
        return server, bound

    def _control_service(self, guard: CallGuard) -> ControlService:
        return ControlService(
            self._driver,
            self._tools.engine,
            self._budget,
            self._store,
            self._entrance,
            guard,
            self._version,
            lambda: self._loaded_bytes / max(1, self._plan.bf16_bytes),
            lambda: self._background(self._set_health(serving=False)),
            self._same_host,
            self._data_plane,
        )

    def _beside_grpc(self) -> list[SameHost | DataPlane]:
        """What else trainers come to."""
        return [each for each in (self._same_host, self._data_plane) if each is not None]

    def _make_data_plane(self, parts: Parts) -> DataPlane | None:
        """Raises InvalidRequest for an address without protection."""
        place = self._config.data_plane
        return None if place is None else DataPlane(place.address, place.reached_at, self._config.security, parts)

    def _make_same_host(self, parts: Parts) -> SameHost | None:
        """Raises ListenError where it was asked for by name and cannot be."""
        place = self._config.same_host
        if place is None:
            return None
        try:
            return SameHost(place.directory, parts, place.spin_s)
        except ListenError as error:
            if place.is_wanted:
                raise
            _log.warning("trainers on this host will not share memory with the server: %s", error)
            return None

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
        self._budget.reserve(Kind.WEIGHTS, resident_bytes(self._plan, weight_format, nodes), _SERVER, "the model")

        def progress(size_bytes: int) -> None:
            if self._stop_loading.is_set():
                raise _StoppedWhileLoadingError
            self._loaded_bytes += size_bytes
            on_loaded_bytes(size_bytes)

        try:
            return await asyncio.get_running_loop().run_in_executor(
                None, load_model, self._plan, weight_format, progress, self._config.placement
            )
        except _StoppedWhileLoadingError:
            return None

    async def _drain(self, grpc_server: grpc.aio.Server) -> None:
        """Stops accepting, finishes what was accepted, saves what has no checkpoint, lets the outcomes leave."""
        core, driver = self._core, self._driver
        driver.do(lambda now: core.stop(now, self._config.shutdown_timeout_s))
        await self._health.enter_graceful_shutdown()
        _log.info("draining: %d members are joined", len(core.runs.members))
        await driver.until(lambda: core.has_stopped)
        for beside in self._beside_grpc():
            await beside.stop(_STREAM_GRACE_S)
        await grpc_server.stop(_STREAM_GRACE_S)
