"""Connections beside gRPC: taken from listening sockets, each served by a task."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import kt_expert_native as native

from kt_expert_server.edge.driver import Driver
from kt_expert_server.edge.pace import Pace
from kt_expert_server.engine.budget import MemoryBudget
from kt_expert_server.engine.buffers import BufferPool
from kt_expert_server.errors import ServerError
from kt_expert_server.observe.metrics import Metrics

_GREETING_S = 5.0  # for both messages of the handshake
BACKLOG = 64  # connections that wait to be taken
_MOST_GREETINGS = 64  # connections that have not proved anything yet
_PAUSE_S = 1.0  # where no connection can be taken
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """Of the server, what a connection needs."""

    driver: Driver
    metrics: Metrics
    pace: Pace
    budget: MemoryBudget
    pool: BufferPool
    engine: native.Engine
    gate: native.Gate


class Acceptor:
    """`serve` has a connection until it returns, and tells the other end of a ServerError that it raises. `method` is what
    metrics call it. Used from the event loop's thread."""

    def __init__(self, method: str, metrics: Metrics, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        self._method, self._metrics, self._serve_one = method, metrics, serve
        self._greetings = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening: list[tuple[socket.socket, asyncio.Task[None]]] = []

    def start(self, listening: socket.socket) -> None:
        """Takes the socket, which listens and does not wait."""
        self._listening.append((listening, asyncio.get_running_loop().create_task(self._accept(listening))))

    async def stop(self, grace_s: float) -> None:
        """Takes no more connections, and gives those that are there so long to end. Safe to call twice."""
        for listening, accepting in self._listening:
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)
            listening.close()
        self._listening.clear()
        if self._tasks and grace_s:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @asynccontextmanager
    async def greeting(self) -> AsyncIterator[None]:
        """Around a handshake: it has an end, and few are under way at a time. Raises TimeoutError."""
        self._greetings += 1
        try:
            async with asyncio.timeout(_GREETING_S):
                yield
        finally:
            self._greetings -= 1

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:  # out of descriptors: others will be closed
                _log.warning("a trainer's connection could not be accepted: %s", error)
                await asyncio.sleep(_PAUSE_S)
                continue
            if self._greetings >= _MOST_GREETINGS:
                connection.close()
                continue
            connection.setblocking(False)
            task = loop.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        begun, code = time.monotonic(), "OK"
        self._metrics.call_started(self._method)
        try:
            with connection:
                await self._serve_one(connection)
        except ServerError as error:
            code = error.code
        except (OSError, TimeoutError) as error:
            code = "UNAVAILABLE"
            _log.debug("%s: a trainer went while it connected: %s", self._method, error)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:  # nobody else would tell of it
            code = "INTERNAL"
            _log.exception("a fault in a connection (%s)", self._method)
        finally:
            self._metrics.call_ended(self._method, code, time.monotonic() - begun)
