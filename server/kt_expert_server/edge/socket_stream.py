"""One trainer's connection over a socket: frames as over gRPC, tensors by their places where memory is shared."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable, Iterator

from kt_expert_proto.codec import Decoder, Encoder, Part
from kt_expert_proto.header import FrameError, FrameType, Header
from kt_expert_proto.messages import Messages, joined
from kt_expert_proto.shared import Place

from kt_expert_server.edge.accepting import Parts
from kt_expert_server.edge.driver import StreamReceiver
from kt_expert_server.edge.entrance import Caller
from kt_expert_server.edge.outgoing import LAST_WORDS_S, Outgoing
from kt_expert_server.edge.same_host.memory import SharedMemory, SharedTensors
from kt_expert_server.edge.sockets import Wire
from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.engine.fast_path import FastForwards
from kt_expert_server.errors import InternalError, ServerError
from kt_expert_server.members.requests import error_detail

_TURN_BYTES = 4 * 1024 * 1024  # read or written before others have their turn at the event loop
_log = logging.getLogger(__name__)


class _FromTrainer:
    """Implements ConnectionReceiver."""

    def __init__(self, tensors: SharedTensors | None, receiver: StreamReceiver) -> None:
        self._tensors, self._receiver = tensors, receiver

    def show(self, header: Header, place: Place) -> PooledBuffer | None:
        return self._shared().show(header, place, self._receiver.admit)

    def freed(self, place: Place) -> None:
        self._shared().freed(place)

    def ended(self, payload: bytes) -> None:
        raise FrameError("END only travels from the server")

    def _shared(self) -> SharedTensors:
        if self._tensors is None:
            raise FrameError("a frame is about shared memory; this connection has none")
        return self._tensors


def _call(function: Callable[[Place], None] | None, place: Place) -> None:
    if function is not None:
        function(place)


class SocketStream:
    """Implements Transport. Reading and writing happen in callbacks of the event loop: tasks between the socket and the core
    would cost a small request a turn of the loop each way."""

    def __init__(
        self, parts: Parts, caller: Caller, wire: Wire, memory: SharedMemory | None = None, fast: FastForwards | None = None
    ) -> None:  # fmt: skip
        """`memory`: that the trainer sees too. `fast`: what it may ask of the engine beside this stream."""
        self._driver, self._metrics, self._caller = parts.driver, parts.metrics, caller
        self._wire, self._fast, self._loop = wire, fast, asyncio.get_running_loop()
        self._tensors = self._share(memory, parts) if memory is not None else None
        lend = self._tensors.lend if self._tensors is not None else lambda _: None
        self._outgoing = Outgoing(parts.pace, caller.paced_as, lend)
        self._encoder = Encoder(checksum=not wire.has_checksums)
        self._writing: Iterator[list[Part]] | None = None  # the encoder's messages of what is queued
        self._unsent: list[Part] = []  # of a message that has been begun
        self._begun: tuple[str, float] | None = None  # a pass whose outcome leaves, and since when
        self._flushes = self._waits_to_write = False
        self._pause: asyncio.Task[None] | None = None
        self._is_ending = False
        self._over: asyncio.Future[None] = self._loop.create_future()  # nothing more is read or written

    def _share(self, memory: SharedMemory, parts: Parts) -> SharedTensors:
        """Nothing of it may keep the stream once it is over: its memory would stay until the garbage collector comes."""
        free = weakref.WeakMethod(self._free)
        return SharedTensors(memory, parts.pool, lambda place: _call(free(), place))

    async def run(self) -> None:
        """Returns when either side has ended the stream."""
        try:
            self._stream = self._driver.open_stream(self, self._caller.identity, self._tensors, self._fast)
        except ServerError as error:  # there are too many
            self.end(error)
            await self._over
            return
        receiver = StreamReceiver(self._driver, self._stream)
        self._decoder: Decoder[PooledBuffer] = Decoder(receiver, _FromTrainer(self._tensors, receiver))
        self._messages = Messages(self._decoder)
        self._read_on()
        try:
            await self._over
        finally:
            self._finish()
            if self._pause is not None:
                self._pause.cancel()
            self._loop.remove_reader(self._wire.fileno())
            self._loop.remove_writer(self._wire.fileno())
            self._driver.close_stream(self._stream)
            self._decoder.close()
            self._outgoing.clear()

    # Transport

    def send(self, header: Header, payload: bytes | PooledBuffer) -> None:
        if self._is_ending:
            return
        too_many = self._outgoing.say(header, payload)
        if too_many is not None:
            self.end(too_many)
        self._flush_soon()

    def end(self, error: ServerError | None) -> None:
        if self._is_ending:
            return
        if error is not None:
            # The rest of a message that was begun has to leave, and its memory will be another's.
            self._unsent = [bytes(part) for part in self._unsent]
            self._outgoing.clear()
            self._writing = None
            self._add(Header(FrameType.END), error_detail(error).SerializeToString())
        self._is_ending = True
        self._flush_soon()
        self._loop.call_later(LAST_WORDS_S, self._finish)

    def _free(self, place: Place) -> None:
        if not self._is_ending and not self._over.done():
            self._add(Header(FrameType.FREE), place.pack())

    def _add(self, header: Header, payload: bytes | PooledBuffer) -> None:
        self._outgoing.add(header, payload)
        self._flush_soon()

    # The socket

    def _finish(self) -> None:
        if not self._over.done():
            self._over.set_result(None)

    def _read_on(self) -> None:
        """What has come already says nothing of itself where the wire keeps it."""
        self._loop.add_reader(self._wire.fileno(), self._readable)
        if self._wire.keeps_bytes:
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        taken = 0
        while taken < _TURN_BYTES and self._pause is None and not self._over.done():
            room = self._messages.room()
            try:
                size = self._wire.receive_into(room)
            except BlockingIOError:
                return
            except OSError:
                size = 0
            if not size:
                self._finish()
                return
            taken += size
            self._take(size)
            if size < len(room) and not self._wire.keeps_bytes:
                return
        if self._wire.keeps_bytes and self._pause is None and not self._over.done():
            self._loop.call_soon(self._readable)

    def _take(self, size: int) -> None:
        """Passes on what has come, at the pace of its sender."""
        try:
            self._driver.feed(self._stream, lambda: self._feed(size))
        except Exception:  # nobody else would tell of it, and the trainer would wait
            _log.exception("a fault in a trainer's connection")
            self.end(InternalError("internal fault; see the server's log"))
        if self._outgoing.was_refused and self._pause is None and not self._over.done():
            self._loop.remove_reader(self._wire.fileno())
            self._pause = self._loop.create_task(self._wait_for_pace())

    def _feed(self, size: int) -> None:
        if not self._hears():
            return
        for message in self._messages.received(size):
            if not self._hears():
                return
            self._decoder.feed(message)
            if self._outgoing.was_refused:
                return  # the rest comes after the pause

    def _hears(self) -> bool:
        """The core may end the stream with any message."""
        return not self._is_ending

    async def _wait_for_pace(self) -> None:
        await self._outgoing.settle()
        self._pause = None
        if not self._over.done():
            self._take(0)
            if self._pause is None:
                self._read_on()

    def _flush_soon(self) -> None:
        """After all that the core says now."""
        if not self._flushes and not self._waits_to_write:
            self._flushes = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushes = False
        if self._over.done():
            return
        sent = 0
        try:
            while self._unsent or self._next_message():
                before = sum(map(len, self._unsent))
                self._unsent = self._wire.send(self._unsent)
                if self._unsent:
                    self._wait_to_write(waits=True)
                    return
                sent += before
                if sent >= _TURN_BYTES and self._next_message():  # asked at once: what has left may be acknowledged now
                    self._wait_to_write(waits=False)
                    self._flush_soon()
                    return
        except OSError:  # the trainer is gone
            self._finish()
            return
        self._wait_to_write(waits=False)
        if self._is_ending:
            self._finish()

    def _next_message(self) -> bool:
        """Whether there is one; it is what is to be sent next. The one before has been sent."""
        self._outgoing.release_copied()
        if self._writing is None and self._outgoing:
            direction = self._outgoing.first_pass()
            self._begun = None if direction is None else (direction, time.monotonic())
            self._writing = self._encoder.gathered(self._outgoing)
        parts = next(self._writing, None) if self._writing is not None else None
        if parts is not None:
            self._unsent = joined(parts)
            return True
        self._outgoing.release_copied()
        self._writing = None
        if self._begun is not None:
            self._metrics.stage(self._begun[0], "send", time.monotonic() - self._begun[1])
            self._begun = None
        return bool(self._outgoing) and self._next_message()

    def _wait_to_write(self, *, waits: bool) -> None:
        if waits != self._waits_to_write:
            self._waits_to_write = waits
            if waits:
                self._loop.add_writer(self._wire.fileno(), self._flush)
            else:
                self._loop.remove_writer(self._wire.fileno())
