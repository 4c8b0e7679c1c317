"""Frames over one long-lived bidirectional gRPC stream with identity serializers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from kt_expert_proto.channel import SESSION_METHOD
from kt_expert_proto.codec import Buffer, Decoder, Encoder, Outbound
from kt_expert_proto.header import FrameError
from kt_expert_proto.malloc import keep_freed_memory

from kt_expert_client.errors import KtExpertError, ServerFault, ServerUnavailable, from_rpc
from kt_expert_client.wire.base import MAX_QUIET_S, Receiver, is_quiet

Metadata = tuple[tuple[str, str], ...]


class GrpcStreamTransport:
    """Implements Transport. Unbounded queue on purpose: the session's credits bound what can wait in it."""

    fast_path = None

    def __init__(self, channel: grpc.Channel, metadata: Metadata, receiver: Receiver) -> None:
        keep_freed_memory()
        self._outgoing: queue.SimpleQueue[Sequence[Outbound] | None] = queue.SimpleQueue()
        self._receiver = receiver
        self._decoder: Decoder[Buffer] = Decoder(receiver)
        self._closed = threading.Event()
        self._failure: KtExpertError | None = None
        exchange = channel.stream_stream(SESSION_METHOD, request_serializer=None, response_deserializer=None)
        self._call: Any = exchange(self._requests(), metadata=metadata)
        threading.Thread(target=self._read, name="kt-expert-reader", daemon=True).start()

    def send(self, frames: Sequence[Outbound]) -> None:
        self._outgoing.put(frames)

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._outgoing.put(None)
        self._call.cancel()

    def _requests(self) -> Iterator[bytes]:
        encoder = Encoder()
        while (first := self._outgoing.get()) is not None:
            if is_quiet(first):
                first = self._with_next(first)
            try:
                yield from encoder.messages(self._queued(first))
            except Exception as error:  # gRPC would only log it, and every waiter would hang
                self._failure = ServerUnavailable(f"a request could not be sent: {error!r}")
                self._call.cancel()
                return

    def _with_next(self, frames: Sequence[Outbound]) -> Sequence[Outbound]:
        """With what follows soon. An end is left for later."""
        try:
            more = self._outgoing.get(timeout=MAX_QUIET_S)
        except queue.Empty:
            return frames
        if more is None:
            self._outgoing.put(None)
            return frames
        return [*frames, *more]

    def _queued(self, first: Sequence[Outbound]) -> Iterator[Outbound]:
        """What waits now; it may travel together."""
        frames: Sequence[Outbound] | None = first
        while frames is not None and not self._closed.is_set():
            yield from frames
            try:
                frames = self._outgoing.get_nowait()
            except queue.Empty:
                return
        if frames is None:
            self._outgoing.put(None)

    def _read(self) -> None:
        end: KtExpertError = ServerUnavailable("the server ended the session")
        try:
            for message in self._call:
                self._decoder.feed(message)
        except grpc.RpcError as error:
            end = from_rpc(error, "the session with the server ended")
        except FrameError as error:
            end = ServerFault(f"the server sent a malformed frame: {error}")
        except Exception as error:  # every waiter must hear of it, whatever it is
            end = ServerFault(f"an answer of the server could not be taken: {error!r}")
        self._decoder.close()
        if self._closed.is_set():
            end = ServerUnavailable("the session was closed by this trainer")
        self.close()
        self._receiver.on_end(self._failure or end)
