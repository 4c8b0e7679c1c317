"""The session stream over gRPC: messages of whole pieces in both directions, no protobuf in between."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from kt_expert_proto.channel import SESSION_METHOD
from kt_expert_proto.codec import Decoder, Encoder, Memory, Outbound
from kt_expert_proto.header import Header, Op

from kt_expert_server.edge.auth import Authenticator
from kt_expert_server.edge.driver import Driver, StreamReceiver
from kt_expert_server.edge.status import abort, abort_fault
from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.errors import ServerError
from kt_expert_server.observe.metrics import Metrics

Context = grpc.aio.ServicerContext[bytes, bytes]
_METHOD = "Exchange"
_PASSES = (Op.FORWARD, Op.BACKWARD)
_LAST_WORDS_S = 2.0  # for what was queued before an end to leave


class SessionStreams(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Serves /kt_expert.v1.Session/Exchange with identity serializers."""

    def __init__(self, driver: Driver, authenticator: Authenticator, metrics: Metrics) -> None:
        self._driver, self._authenticator, self._metrics = driver, authenticator, metrics

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method != SESSION_METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._exchange)

    async def _exchange(self, messages: AsyncIterator[bytes], context: Context) -> None:
        begun, code = time.monotonic(), "OK"
        self._metrics.call_started(_METHOD)
        try:
            identity = self._authenticator.trainer(context.invocation_metadata() or (), context.peer())
            await GrpcStream(self._driver, self._metrics).run(messages, context, identity)
        except ServerError as error:
            code = error.code
            await abort(context, error)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        except Exception:  # the last place that can turn it into a status
            code = "INTERNAL"
            await abort_fault(context, _METHOD)
        finally:
            self._metrics.call_ended(_METHOD, code, time.monotonic() - begun)


class GrpcStream:
    """Implements Transport: a reader that feeds the decoder and a writer that drains what the core has to say."""

    def __init__(self, driver: Driver, metrics: Metrics) -> None:
        self._driver, self._metrics = driver, metrics
        self._outgoing: deque[tuple[Header, bytes | PooledBuffer]] = deque()
        self._has_outgoing = asyncio.Event()
        self._ended: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()

    def send(self, header: Header, payload: bytes | PooledBuffer) -> None:
        self._outgoing.append((header, payload))
        self._has_outgoing.set()

    def end(self, error: ServerError | None) -> None:
        if self._ended.done():
            return
        self._ended.set_result(error)
        if error is not None:
            self._outgoing.clear()  # buffers among it may serve others from now on

    async def run(self, messages: AsyncIterator[bytes], context: Context, identity: str) -> None:
        """Returns when the peer has ended the stream. Raises the error the core ended it with."""
        stream = self._driver.open_stream(self, identity)
        decoder = Decoder(StreamReceiver(self._driver, stream))
        reader = asyncio.ensure_future(self._read(stream, decoder, messages))
        writer = asyncio.ensure_future(self._write(context))
        try:
            await asyncio.wait((self._ended, reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                error = self._ended.result()
                if error is not None:
                    raise error
                await self._flush(writer)
            else:
                for end in (reader, writer):
                    if end.done():
                        end.result()
        finally:
            self._driver.close_stream(stream)
            decoder.close()
            for end in (reader, writer):
                end.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _flush(self, writer: asyncio.Future[None]) -> None:
        """Lets what was queued before the end leave, where the peer takes it."""
        deadline = time.monotonic() + _LAST_WORDS_S
        while (self._outgoing or self._has_outgoing.is_set()) and not writer.done() and time.monotonic() < deadline:
            await asyncio.wait((writer,), timeout=0.01)

    async def _read(self, stream: int, decoder: Decoder[PooledBuffer], messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            self._driver.feed(stream, lambda message=message: decoder.feed(message))  # type: ignore[misc]
            if self._ended.done():
                return

    async def _write(self, context: Context) -> None:
        encoder = Encoder()
        while True:
            await self._has_outgoing.wait()
            begun, first = time.monotonic(), next((header for header, _ in self._outgoing), None)
            for message in encoder.messages(self._queued()):
                if self._ended.done() and self._ended.result() is not None:
                    return  # in the middle of a tensor whose memory may be another's by now
                await context.write(message)
            if first is not None and first.op in _PASSES:
                self._metrics.stage(first.op.name.lower(), "send", time.monotonic() - begun)
            if not self._outgoing:
                self._has_outgoing.clear()

    def _queued(self) -> Iterator[Outbound]:
        while self._outgoing:
            header, payload = self._outgoing.popleft()
            yield header, payload if isinstance(payload, bytes) else Memory(payload.view)
