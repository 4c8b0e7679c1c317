"""The session stream over gRPC: messages of whole pieces in both directions, no protobuf in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
from kt_expert_proto.channel import SESSION_METHOD
from kt_expert_proto.codec import Decoder, Encoder
from kt_expert_proto.header import Header

from kt_expert_server.edge.driver import Driver, StreamReceiver
from kt_expert_server.edge.entrance import Caller, Entrance
from kt_expert_server.edge.outgoing import LAST_WORDS_S, Outgoing
from kt_expert_server.edge.pace import Pace
from kt_expert_server.edge.status import abort, abort_fault
from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.errors import ServerError
from kt_expert_server.observe.metrics import Metrics

Context = grpc.aio.ServicerContext[bytes, bytes]
_METHOD = "Exchange"


class SessionStreams(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Serves /kt_expert.v1.Session/Exchange with identity serializers."""

    def __init__(self, driver: Driver, entrance: Entrance, metrics: Metrics) -> None:
        self._driver, self._entrance, self._metrics = driver, entrance, metrics

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method != SESSION_METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._exchange)

    async def _exchange(self, messages: AsyncIterator[bytes], context: Context) -> None:
        begun, code = time.monotonic(), "OK"
        self._metrics.call_started(_METHOD)
        try:
            caller = await self._entrance.trainer(context)
            await GrpcStream(self._driver, self._metrics, self._entrance.pace, caller).run(messages, context)
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

    def __init__(self, driver: Driver, metrics: Metrics, pace: Pace, caller: Caller) -> None:
        self._driver, self._metrics, self._caller = driver, metrics, caller
        self._outgoing = Outgoing(pace, caller.paced_as)
        self._has_outgoing = asyncio.Event()
        self._ended: asyncio.Future[ServerError | None] = asyncio.get_running_loop().create_future()

    def send(self, header: Header, payload: bytes | PooledBuffer) -> None:
        if self._ended.done():
            return
        too_many = self._outgoing.say(header, payload)
        if too_many is not None:
            self.end(too_many)
        self._has_outgoing.set()

    def end(self, error: ServerError | None) -> None:
        if self._ended.done():
            return
        self._ended.set_result(error)
        if error is not None:
            self._outgoing.clear()
            self._has_outgoing.set()  # the writer is to see that it has ended

    async def run(self, messages: AsyncIterator[bytes], context: Context) -> None:
        """Returns when the peer has ended the stream. Raises the error the core ended it with."""
        stream = self._driver.open_stream(self, self._caller.identity)
        decoder = Decoder(StreamReceiver(self._driver, stream))
        reader = asyncio.ensure_future(self._read(stream, decoder, messages))
        writer = asyncio.ensure_future(self._write(context))
        try:
            await asyncio.wait((self._ended, reader, writer), return_when=asyncio.FIRST_COMPLETED)
            if self._ended.done():
                error = self._ended.result()
                if error is not None:
                    # gRPC may never send a status that overtakes a message whose write was cancelled.
                    await asyncio.wait((writer,), timeout=LAST_WORDS_S)
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
            self._outgoing.clear()

    def _is_broken(self) -> bool:
        return self._ended.done() and self._ended.result() is not None

    async def _flush(self, writer: asyncio.Future[None]) -> None:
        """Lets what was queued before the end leave, where the peer takes it."""
        deadline = time.monotonic() + LAST_WORDS_S
        while (self._outgoing or self._has_outgoing.is_set()) and not writer.done() and time.monotonic() < deadline:
            await asyncio.wait((writer,), timeout=0.01)

    async def _read(self, stream: int, decoder: Decoder[PooledBuffer], messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            if self._outgoing.was_refused:
                await self._outgoing.settle()
            self._driver.feed(stream, lambda message=message: decoder.feed(message))  # type: ignore[misc]
            if self._ended.done():
                return

    async def _write(self, context: Context) -> None:
        encoder = Encoder()
        while True:
            await self._has_outgoing.wait()
            if self._is_broken():
                return
            begun, direction = time.monotonic(), self._outgoing.first_pass()
            for message in encoder.messages(self._outgoing):
                self._outgoing.release_copied()
                await context.write(message)
                if self._is_broken():
                    return  # in the middle of a tensor whose memory may be another's by now
            if direction is not None:
                self._metrics.stage(direction, "send", time.monotonic() - begun)
            if not self._outgoing:
                self._has_outgoing.clear()
