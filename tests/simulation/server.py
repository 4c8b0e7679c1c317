"""A simulated server process: the product's core and store, driven by the heap."""

from __future__ import annotations

import random

import kt_expert_native as native
from kt_expert_proto.codec import Decoder, Encoder, Memory, Outbound
from kt_expert_proto.header import DamagedFrame, FrameError, FrameType, Header
from kt_expert_proto.shared import Place
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.engine.budget import MemoryBudget
from kt_expert_server.engine.buffers import BufferPool, PooledBuffer
from kt_expert_server.engine.passes import Tools
from kt_expert_server.engine.together import SharedPass
from kt_expert_server.engine.work import as_server_error
from kt_expert_server.errors import InvalidRequest, ServerError, StreamDamaged
from kt_expert_server.members.actions import Action, EndStream, Send, StartDisk, StartWork
from kt_expert_server.members.core import ServerCore, State
from kt_expert_server.members.limits import Limits
from kt_expert_server.observe.observer import NullObserver

from simulation.disk import MachineDiedError, SimulatedDisk
from simulation.heap import EventHeap
from simulation.model import base_model
from simulation.network import Connection
from simulation.shared import Shared
from simulation.sockets import Bites

_TILE_TOKENS = (2, 1024)  # most batches are computed in several parts, or whole and together with others'
_BUDGET_BYTES = 1 << 26
_SHUTDOWN_TIMEOUT_S = 20.0
_ENGINE = native.Engine(1)


class CountingPool(BufferPool):
    """Knows how many buffers are out."""

    def __init__(self) -> None:
        super().__init__(max_kept_bytes=0)
        self.out = 0

    def take(self, size_bytes: int) -> PooledBuffer:
        self.out += 1
        return super().take(size_bytes)

    def give_back(self, memory: object) -> None:
        self.out -= 1


class ServerProcess:
    """Lives until it is killed; start() makes the next one, on the same disk."""

    def __init__(self, heap: EventHeap, rng: random.Random, disk: SimulatedDisk, limits: Limits, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._heap, self._rng, self.disk, self._limits = heap, rng, disk, limits
        self.core: ServerCore | None = None
        self.paused_until = 0.0
        self.generation = 0
        self.kills = 0
        self.stops = 0
        self.shared_batches = 0  # computed in one pass with others
        self._tile_tokens = rng.choice(_TILE_TOKENS)
        self._down = 0.0  # how long it stays away after it has stopped
        self._streams: dict[int, _Stream] = {}
        self._tick_at: float | None = None

    @property
    def is_up(self) -> bool:
        return self.core is not None

    def start(self) -> None:
        if self.core is not None:
            return
        self.generation += 1
        self.pool = CountingPool()
        self.budget = MemoryBudget(_BUDGET_BYTES)
        store = CheckpointStore(self.disk)
        try:
            store.prepare()
        except MachineDiedError:
            self.kill()
            self.restart_after(1.0)
            return
        self.core = ServerCore(
            Tools(_ENGINE, self.budget, self.pool, NullObserver(), tile_tokens=self._tile_tokens), self._limits, store
        )
        self.core.become_ready(base_model())
        self._next_stream = 1
        self._streams = {}
        self.shared: list[Shared] = []  # of this life's streams
        self._tick_at = None

    def kill(self) -> None:
        """kill -9, or the power: memory is gone, connections end, the disk keeps what it must."""
        self.kills += 1
        streams, self._streams, self.core = self._streams, {}, None
        self.generation += 1
        self.disk.crash()
        for stream in streams.values():
            stream.connection.close(1, "the server died")

    def stop(self, down: float) -> None:
        """SIGTERM: it finishes what it has accepted, and is gone for that long."""
        if self.core is not None and self.core.state is not State.DRAINING:
            self.stops += 1
            self._down = down
            self.core.stop(self._heap.now, _SHUTDOWN_TIMEOUT_S)
            self.carry_out()

    def _exit(self) -> None:
        """Everything it wrote is there for the next one, synchronised or not."""
        streams, self._streams, self.core = self._streams, {}, None
        self.generation += 1
        for stream in streams.values():
            stream.connection.close(1, "the server has stopped")
        self.restart_after(self._down)

    def accept(self, connection: Connection) -> _Stream | None:
        """None where nobody listens."""
        if self.core is None:
            return None
        number, self._next_stream = self._next_stream, self._next_stream + 1
        stream = _Stream(self, number, connection)
        self._streams[number] = stream
        if connection.shared is not None:
            self.shared.append(connection.shared)
        self.core.stream_opened(number, "", self._heap.now, stream.tensors)
        return stream

    def later(self, action: object, *arguments: object) -> None:
        """An event of this process: not while it is paused, and not after its death."""
        generation = self.generation

        def run() -> None:
            if generation != self.generation:
                return
            if self._heap.now < self.paused_until:
                self._heap.at(self.paused_until, run)
            else:
                action(*arguments)  # type: ignore[operator]

        run()

    def closed(self, number: int) -> None:
        if self.core is not None and self._streams.pop(number, None) is not None:
            self.core.stream_closed(number, self._heap.now)
            self.carry_out()

    def failed(self, number: int, error: FrameError) -> None:
        if self.core is not None:
            kind = StreamDamaged if isinstance(error, DamagedFrame) else InvalidRequest
            self.core.fail(number, kind(f"malformed frame: {error}"), self._heap.now)

    def carry_out(self) -> None:
        """The core's actions, as the product's driver does them."""
        core = self.core
        if core is None:
            return
        while core is self.core and (actions := core.take_actions()):
            for action in actions:
                self._act(action)
        if core is not self.core:
            return
        for stream in list(self._streams.values()):
            stream.flush()
        self.check()
        if core.has_stopped:
            self._exit()
        else:
            self._set_timer()

    def _act(self, action: Action) -> None:
        match action:
            case Send():
                stream = self._streams.get(action.stream)
                if stream is not None:
                    stream.queue(action.header, action.payload)
            case EndStream():
                stream = self._streams.pop(action.stream, None)
                if stream is not None:
                    stream.end(action.error)
            case StartWork():
                if isinstance(action.work, SharedPass):
                    self.shared_batches += len(action.work.pieces)
                self._after(0.0005 + 0.003 * self._rng.random(), self._work, action)
            case StartDisk():
                self._after(0.001 + 0.05 * self._rng.random(), self._disk_job, action)
            case _:
                pass

    def _after(self, delay: float, function: object, *arguments: object) -> None:
        generation = self.generation
        self._heap.after(delay, lambda: self.later(function, *arguments) if generation == self.generation else None)

    def _work(self, action: StartWork) -> None:
        assert self.core is not None
        error: Exception | None = None
        try:
            action.work.run_part(action.part)
        except Exception as caught:
            if as_server_error(caught) is None:
                raise
            error = caught
        self.core.work_done(error, self._heap.now)
        self.carry_out()

    def _disk_job(self, action: StartDisk) -> None:
        assert self.core is not None
        result: object = None
        error: Exception | None = None
        try:
            result = action.job()
        except MachineDiedError:
            self.kill()
            self.restart_after(1.0)
            return
        except ServerError as caught:
            error = caught
        self.core.disk_done(action.job_id, result, error, self._heap.now)
        self.carry_out()

    def restart_after(self, delay: float) -> None:
        self._heap.after(delay, self.start)

    def _set_timer(self) -> None:
        assert self.core is not None
        deadline = self.core.next_deadline()
        if deadline is None or (self._tick_at is not None and self._heap.now <= self._tick_at <= deadline):
            return
        self._tick_at = deadline
        self._after(max(0.0, deadline - self._heap.now), self._tick)

    def _tick(self) -> None:
        assert self.core is not None
        self._tick_at = None
        self.core.tick(self._heap.now)
        self.carry_out()

    def check(self) -> None:
        """What must hold after every event of this process."""
        if self.core is None:
            return
        assert self.budget.is_sound
        assert self.core._streams.keys() == self._streams.keys(), "a stream that has ended is still counted"
        for member in self.core.runs.members:
            last, settled, used = 0, True, 0
            for entry in member.log:
                assert entry.request_id > last, f"{member} has requests out of order"
                assert settled or entry.outcome is None, f"{member} has outcomes out of order"
                last, settled, used = entry.request_id, entry.outcome is not None, used + (entry.credit_bytes or 0)
            assert used <= member.credits.used_bytes, f"{member}: credits do not cover its requests"


class _Stream:
    """The server's end of a connection, as the product's transport is."""

    def __init__(self, process: ServerProcess, number: int, connection: Connection) -> None:
        self._process, self.number, self.connection = process, number, connection
        self._encoder = Encoder(piece_bytes=process.piece_bytes)
        self._decoder: Decoder[PooledBuffer] = Decoder(self, None if connection.shared is None else self)
        self._bites = None if connection.bites_rng is None else Bites(self._decoder, connection.bites_rng)
        self._waiting: list[Outbound] = []
        self._is_over = False
        self.tensors = None if connection.shared is None else connection.shared.serve(process.pool, self._free)

    def admit(self, header: Header) -> PooledBuffer | None:
        core = self._process.core
        assert core is not None
        return core.admit(self.number, header, self._process._heap.now)

    def show(self, header: Header, place: Place) -> PooledBuffer | None:
        core, now = self._process.core, self._process._heap.now
        assert core is not None
        assert self.tensors is not None  # a decoder of the network refuses places by itself
        return self.tensors.show(header, place, lambda about, there: core.admit(self.number, about, now, there))

    def freed(self, place: Place) -> None:
        assert self.tensors is not None
        self.tensors.freed(place)

    def ended(self, payload: bytes) -> None:
        raise AssertionError(f"a trainer ended a stream by a frame: {payload!r}")

    def _free(self, place: Place) -> None:
        if not self._is_over:
            self._waiting.append((Header(FrameType.FREE), place.pack()))

    def deliver(self, header: Header, payload: bytes | PooledBuffer) -> None:
        core = self._process.core
        assert core is not None
        core.received(self.number, header, payload, self._process._heap.now)

    def on_message(self, message: bytes) -> None:
        self._process.later(self._message, message)

    def _message(self, message: bytes) -> None:
        if self._is_over:
            return
        try:
            (self._bites or self._decoder).feed(message)
        except FrameError as error:
            if self.tensors is not None:
                raise AssertionError(f"a frame made no sense on one host: {error}") from error
            self._process.failed(self.number, error)
        self._process.carry_out()

    def on_end(self, reason: str) -> None:
        self._process.later(self._ended)

    def _ended(self) -> None:
        self._over()
        self._process.closed(self.number)

    def queue(self, header: Header, payload: bytes | PooledBuffer) -> None:
        if isinstance(payload, bytes):
            self._waiting.append((header, payload))
        else:
            place = None if self.tensors is None else self.tensors.lend(payload)
            self._waiting.append((header, place or Memory(payload.view)))

    def flush(self) -> None:
        if self._waiting:
            for message in self._encoder.messages(self._waiting):
                self.connection.send(1, message)
            self._waiting = []

    def end(self, error: ServerError | None) -> None:
        if error is None:
            self.flush()
        self._over()
        self.connection.close(
            1, "the server ended the session" if error is None else f"{error.code}|{error.retry_delay_s}|{error}"
        )

    def _over(self) -> None:
        self._is_over = True
        self._waiting = []
        self._decoder.close()
