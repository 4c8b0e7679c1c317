"""A connection over a socket whose core refuses it, falls over, or has much to say."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import kt_expert_native as native
import pytest
from kt_expert_proto.codec import Decoder, Encoder
from kt_expert_proto.header import FrameType, Header, Op
from kt_expert_proto.messages import Messages
from kt_expert_proto.status import STATUS_NUMBERS
from kt_expert_proto.v1.session_pb2 import ErrorDetail
from kt_expert_server.edge.accepting import Parts
from kt_expert_server.edge.entrance import Caller
from kt_expert_server.edge.pace import Pace
from kt_expert_server.edge.socket_stream import SocketStream
from kt_expert_server.edge.sockets import PlainWire
from kt_expert_server.engine.budget import MemoryBudget
from kt_expert_server.engine.buffers import BufferPool
from kt_expert_server.errors import OutOfCapacity
from kt_expert_server.observe.metrics import Metrics


class _Trainer:
    """Implements FrameReceiver and ConnectionReceiver on a blocking socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.frames: list[tuple[Header, Any]] = []
        self.end: ErrorDetail | None = None
        decoder: Decoder[Any] = Decoder(self, self)
        messages = Messages(decoder)
        while size := connection.recv_into(messages.room()):
            for message in messages.received(size):
                decoder.feed(message)

    def admit(self, header: Header) -> None:
        raise AssertionError(header)

    def show(self, header: Header, place: object) -> None:
        raise AssertionError((header, place))

    def deliver(self, header: Header, payload: Any) -> None:
        self.frames.append((header, payload))

    def freed(self, place: object) -> None:
        raise AssertionError(place)

    def ended(self, payload: bytes) -> None:
        self.end = ErrorDetail.FromString(payload)


class _Driver:
    """What a stream asks of the driver. `on_feed` stands for the core."""

    def __init__(self, on_open: Callable[[SocketStream], int], on_feed: Callable[[], None] = lambda: None) -> None:
        self._on_open, self._on_feed = on_open, on_feed
        self.closed: list[int] = []

    def open_stream(self, transport: SocketStream, identity: str, memory: object, fast: object) -> int:
        del identity, memory, fast
        return self._on_open(transport)

    def close_stream(self, stream: int) -> None:
        self.closed.append(stream)

    def feed(self, stream: int, take: object) -> None:
        del stream, take
        self._on_feed()


async def _run(driver: _Driver, trainer: Callable[[socket.socket], Coroutine[Any, Any, None]] | None = None) -> _Trainer:
    here, there = socket.socketpair(socket.AF_UNIX)
    here.setblocking(False)
    pool = BufferPool()
    pace, budget, engine = Pace(100.0, lambda: None), MemoryBudget(1, (pool,)), native.Engine(1)
    parts = Parts(driver, Metrics("0", "x", "y"), pace, budget, pool, engine, native.Gate())  # type: ignore[arg-type]
    made = SocketStream(parts, Caller("", "here"), PlainWire(here, has_checksums=False))
    reading = asyncio.get_running_loop().run_in_executor(None, _Trainer, there)
    if trainer is not None:
        await trainer(there)
    await asyncio.wait_for(made.run(), 10.0)
    here.close()
    found = await reading
    there.close()
    return found


def test_a_stream_too_many_is_told_so() -> None:
    def refuse(_: SocketStream) -> int:
        raise OutOfCapacity("256 streams are open", retry_delay_s=5.0)

    found = asyncio.run(_run(_Driver(refuse)))
    assert found.end is not None
    assert (found.end.code, found.end.message) == (STATUS_NUMBERS["RESOURCE_EXHAUSTED"], "256 streams are open")
    assert found.end.retry_delay_ms == 5000


def test_a_fault_ends_the_stream_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    def fall_over() -> None:
        raise ZeroDivisionError("a fault")

    async def say_something(there: socket.socket) -> None:
        for message in Encoder().messages([(Header(FrameType.JOIN), b"")]):
            there.send(message)

    driver = _Driver(lambda _: 7, fall_over)
    found = asyncio.run(_run(driver, say_something))
    assert found.end is not None
    assert found.end.code == STATUS_NUMBERS["INTERNAL"]
    assert "ZeroDivisionError" in caplog.text
    assert driver.closed == [7]


def test_all_that_was_said_before_an_end_arrives() -> None:
    """More than the socket takes at once."""
    content = bytes(100_000)

    def talk(stream: SocketStream) -> int:
        for number in range(20):
            stream.send(Header(FrameType.RESULT, number, op=Op.FORWARD), content)
        stream.end(None)
        return 1

    found = asyncio.run(_run(_Driver(talk)))
    assert [header.request_id for header, _ in found.frames] == list(range(20))
    assert all(payload == content for _, payload in found.frames)
    assert found.end is None


def test_an_error_takes_the_place_of_what_waits() -> None:
    def talk(stream: SocketStream) -> int:
        for number in range(20):
            stream.send(Header(FrameType.RESULT, number, op=Op.FORWARD), bytes(100_000))
        stream.end(OutOfCapacity("enough"))
        return 1

    found = asyncio.run(_run(_Driver(talk)))
    assert found.end is not None
    assert found.end.message == "enough"
    assert found.frames == []
