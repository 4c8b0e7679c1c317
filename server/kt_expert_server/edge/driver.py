"""Connects the core to the event loop, to the engine's and the disk's threads, and to the transports."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import kt_expert_native as native
from kt_expert_proto.header import DamagedFrame, FrameError, Header

from kt_expert_server.edge.lane import EngineLane
from kt_expert_server.edge.transport import Transport
from kt_expert_server.engine.buffers import PooledBuffer, TensorMemory
from kt_expert_server.engine.fast_path import FastForwards
from kt_expert_server.engine.passes import PassWork
from kt_expert_server.engine.together import SharedPass
from kt_expert_server.engine.work import PASSES, Work, as_server_error
from kt_expert_server.errors import InvalidRequest, StreamDamaged
from kt_expert_server.members.actions import Action, EndStream, Note, Retire, Send, StartDisk, StartWork
from kt_expert_server.members.core import ServerCore
from kt_expert_server.observe.observer import Observer

Result = TypeVar("Result")
_log = logging.getLogger(__name__)
_FAULT_BYTES = 4


class StreamReceiver:
    """Implements the codec's FrameReceiver for one stream."""

    def __init__(self, driver: Driver, stream: int) -> None:
        self._driver, self._stream = driver, stream

    def admit(self, header: Header, offered: PooledBuffer | None = None) -> PooledBuffer | None:
        return self._driver.core.admit(self._stream, header, time.monotonic(), offered)

    def deliver(self, header: Header, payload: bytes | PooledBuffer) -> None:
        self._driver.core.received(self._stream, header, payload, time.monotonic())


class Driver:
    """Used from the event loop's thread."""

    def __init__(self, core: ServerCore, observer: Observer, gate: native.Gate) -> None:
        """`gate`: whoever is inside has the engine for itself."""
        self.core = core
        self._observer = observer
        self._loop = asyncio.get_event_loop()
        self._engine = EngineLane(self._loop, gate)
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="kt-disk")
        self._transports: dict[int, Transport] = {}
        self._next_stream = 1
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._changed: set[asyncio.Future[None]] = set()
        self._is_carrying_out = False

    def open_stream(
        self, transport: Transport, identity: str, memory: TensorMemory | None = None, fast: FastForwards | None = None
    ) -> int:  # fmt: skip
        """`memory`: that the trainer sees too. `fast`: see ServerCore.stream_opened. Raises OutOfCapacity."""
        stream = self._next_stream
        self.core.stream_opened(stream, identity, time.monotonic(), memory, fast)
        self._next_stream += 1
        self._transports[stream] = transport
        self._carry_out()
        return stream

    def close_stream(self, stream: int) -> None:
        """The peer or the network ended it."""
        if self._transports.pop(stream, None) is not None:
            self.core.stream_closed(stream, time.monotonic())
            self._carry_out()

    def feed(self, stream: int, take: Callable[[], None]) -> None:
        """`take` passes a message to the stream's decoder."""
        try:
            take()
        except FrameError as error:
            kind = StreamDamaged if isinstance(error, DamagedFrame) else InvalidRequest
            self.core.fail(stream, kind(f"malformed frame: {error}"), time.monotonic())
        self._carry_out()

    def do(self, event: Callable[[float], Result]) -> Result:
        """Calls one of the core's methods with the time, and carries out what follows from it."""
        try:
            return event(time.monotonic())
        finally:
            self._carry_out()

    async def on_disk(self, job: Callable[[], Result]) -> Result:
        """In line with the core's own jobs. Raises what the job raises."""
        return await self._loop.run_in_executor(self._disk, job)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something in the core, which has a deadline for it."""
        while not condition():
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._changed.add(waiter)
            await waiter
            self._changed.discard(waiter)

    def close(self) -> None:
        """Does not wait: what still runs has had its token cancelled and ends by itself."""
        if self._timer is not None:
            self._timer.cancel()
        self._engine.close()
        self._disk.shutdown(wait=False, cancel_futures=True)

    def _carry_out(self) -> None:
        if self._is_carrying_out:
            return  # a transport called back; the loop below goes on
        self._is_carrying_out = True
        try:
            while actions := self.core.take_actions():
                for action in actions:
                    self._act(action)
        finally:
            self._is_carrying_out = False
        self._set_timer()
        for waiter in self._changed:
            if not waiter.done():
                waiter.set_result(None)

    def _act(self, action: Action) -> None:
        match action:
            case Send():
                transport = self._transports.get(action.stream)
                if transport is not None:
                    transport.send(action.header, action.payload)
            case EndStream():
                transport = self._transports.pop(action.stream, None)
                if transport is not None:
                    transport.end(action.error)
            case StartWork():
                work, part, begun = action.work, action.part, time.monotonic()
                self._engine.submit(lambda: work.run_part(part), lambda error: self._work_done(work, part, error, begun))
            case StartDisk():
                job_id = action.job_id
                self._disk.submit(action.job).add_done_callback(lambda done: self._later(self._disk_done, job_id, done))
            case Retire():
                self._disk.submit(_drop, action.tickets)
            case Note():
                _log.log(action.level, "%s", action.text)

    def _later(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _work_done(self, work: Work | SharedPass, part: int, error: BaseException | None, begun: float) -> None:
        now = time.monotonic()
        pieces = work.pieces if isinstance(work, SharedPass) else (work,)
        for piece in pieces:
            piece.spent_s += now - begun
            has_ended = error is not None or part + 1 == piece.parts
            if has_ended and piece.kind in PASSES:
                self._observer.stage(piece.kind, "compute", piece.spent_s)
            elif has_ended and piece.kind == "step":
                self._observer.step(piece.spent_s)
        first = pieces[0]  # of those that were computed together, each has the time of all
        if isinstance(first, PassWork) and (error is not None or part + 1 == first.parts):
            for stage, seconds in first.stages_s.items():
                self._observer.engine_stage(first.kind, stage, seconds)
        self.core.work_done(_plain(error), now, _fault(error, "a piece of work"))
        # An error's traceback holds what the work held, until the collector comes.
        del error
        self._carry_out()

    def _disk_done(self, job_id: int, done: Future[object]) -> None:
        if done.cancelled():
            return
        error = done.exception()
        result = None if error is not None else done.result()
        self.core.disk_done(job_id, result, _plain(error), time.monotonic(), _fault(error, "a job on the disk"))
        self._carry_out()

    def _set_timer(self) -> None:
        """A timer that fires too early is set anew then: most deadlines are never reached."""
        deadline = self.core.next_deadline()
        if deadline is None or (self._timer is not None and self._timer_at <= deadline) or self._loop.is_closed():
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        self._timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.core.tick(time.monotonic())
        self._carry_out()


def _plain(error: BaseException | None) -> Exception | None:
    if error is None or isinstance(error, Exception):
        return error
    raise error  # KeyboardInterrupt and its like are no outcome of a request


def _fault(error: BaseException | None, what: str) -> str:
    """A word to find an unforeseen error by in the log; empty for the server's own errors."""
    if not isinstance(error, Exception) or as_server_error(error) is not None:
        return ""
    fault = secrets.token_hex(_FAULT_BYTES)
    _log.error("fault %s in %s", fault, what, exc_info=error)
    return fault


def _drop(tickets: tuple[object, ...]) -> None:
    """Runs on the disk's thread: returning memory to the system may take milliseconds."""
    del tickets
