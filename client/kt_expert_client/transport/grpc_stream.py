"""Frames over one long-lived bidirectional gRPC stream with identity serializers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import grpc
from kt_expert_proto.frame import EPOCH_METADATA_KEY, MEMBER_METADATA_KEY, SESSION_METHOD, coalesce

from kt_expert_client.errors import KtExpertError, ServerFault, ServerUnavailable, from_rpc
from kt_expert_client.transport.base import FrameReceiver

_JOIN_TIMEOUT_S = 5.0


class GrpcStreamTransport:
    """Implements Transport. Unbounded queue on purpose: callers hold credits, which bound what can wait in it."""

    def __init__(self, channel: grpc.Channel, member: str, epoch: int) -> None:
        self._outgoing: queue.SimpleQueue[Iterable[bytes] | None] = queue.SimpleQueue()
        metadata = ((MEMBER_METADATA_KEY, member), (EPOCH_METADATA_KEY, str(epoch)))
        exchange = channel.stream_stream(SESSION_METHOD, request_serializer=None, response_deserializer=None)
        self._call: Any = exchange(self._requests(), metadata=metadata)
        self._closed = threading.Event()
        self._send_failure: KtExpertError | None = None
        self._thread: threading.Thread | None = None

    def start(self, receiver: FrameReceiver) -> None:
        self._thread = threading.Thread(target=self._read, args=(receiver,), name="kt-expert-reader", daemon=True)
        self._thread.start()

    def send(self, frames: Iterable[bytes]) -> None:
        self._outgoing.put(frames)

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._outgoing.put(None)
        self._call.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_TIMEOUT_S)

    def _requests(self) -> Iterator[bytes]:
        while (frames := self._outgoing.get()) is not None:
            try:
                yield from coalesce(frames)
            except Exception as error:  # gRPC would only log it, and every waiter would hang
                self._send_failure = ServerUnavailable(f"a request could not be sent: {error!r}")
                self._call.cancel()
                return

    def _read(self, receiver: FrameReceiver) -> None:
        end: KtExpertError = ServerUnavailable("the server ended the session")
        try:
            for message in self._call:
                receiver.on_frame(message)
        except grpc.RpcError as error:
            end = from_rpc(error, "the session with the server ended")
        except Exception as error:  # every waiter must hear of it, whatever it is
            end = ServerFault(f"an answer of the server could not be taken: {error!r}")
            self._call.cancel()
        if self._send_failure is not None:
            end = self._send_failure
        if self._closed.is_set():
            end = ServerUnavailable("the session was closed by this trainer")
        receiver.on_end(end)
