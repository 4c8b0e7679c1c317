"""Frames over a socket, tensors through memory that the server sees too where there is any."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import grpc
from kt_expert_proto.codec import Buffer, Decoder, Encoder, Outbound, Part
from kt_expert_proto.header import FrameError, FrameType, Header
from kt_expert_proto.messages import Messages, joined
from kt_expert_proto.shared import Place
from kt_expert_proto.v1.session_pb2 import ErrorDetail

from kt_expert_client.errors import KtExpertError, ServerFault, ServerUnavailable, from_rpc, from_status
from kt_expert_client.wire.base import MAX_QUIET_S, Receiver, is_quiet
from kt_expert_client.wire.fast_path import FastPath
from kt_expert_client.wire.shared_memory import SharedMemory
from kt_expert_client.wire.sockets import Wire

_MS_PER_S = 1000
_MAX_QUIET_MS = round(MAX_QUIET_S * _MS_PER_S)
# A request up to this size is sent, or put into shared memory, by its caller; a larger one by a thread meanwhile.
_AT_ONCE_BYTES = 256 * 1024


class NotPossibleError(Exception):
    """Why there is no such connection to the server, so that trying again is of no use."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection, and what came with it."""

    wire: Wire
    memory: SharedMemory | None = None
    fast_path: FastPath | None = None


@dataclass(frozen=True, slots=True)
class Connector:
    """`connect` gets an offer from the server and shakes hands; it raises NotPossibleError, grpc.RpcError, or OSError where the
    connection ended. `on_refusal` hears why there can be no such connection, and says what is to be raised; None: another
    transport is tried next. `on_connected` hears whether the handshake came to its end. `what` completes "a connection"."""

    what: str
    connect: Callable[[], Connected]
    on_refusal: Callable[[str], KtExpertError | None]
    on_connected: Callable[[bool], None]


class SocketTransport:
    """Implements Transport and ConnectionReceiver. Small requests leave on their caller's thread, others on the writer's."""

    def __init__(self, connector: Connector, receiver: Receiver) -> None:
        self._connector, self._receiver = connector, receiver
        self._decoder: Decoder[Buffer] = Decoder(receiver, self)
        self._outgoing: queue.SimpleQueue[Sequence[Outbound] | bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of whoever writes: frames leave in the order of the calls
        self._queued = 1  # batches that the writer has not sent; one until there is a connection
        self._quiet: list[Outbound] = []  # frames that wait for others to travel with
        self._closed = False
        self._wire: Wire | None = None
        self._memory: SharedMemory | None = None
        self.fast_path: FastPath | None = None
        self._end: KtExpertError | None = None
        self._reader = threading.Thread(target=self._read, name="kt-expert-reader", daemon=True)
        self._reader.start()

    # Transport

    def send(self, frames: Sequence[Outbound]) -> None:
        with self._lock:
            if is_quiet(frames):
                self._quiet += frames
                if threading.current_thread() is not self._reader:
                    self._flush()  # the reader looks after what it says itself
            else:
                frames, self._quiet = [*self._quiet, *frames], []
                self._pass_on(frames)

    def _flush(self) -> None:
        """Called with the lock held."""
        if self._quiet:
            frames, self._quiet = self._quiet, []
            self._pass_on(frames)

    def _pass_on(self, frames: Sequence[Outbound]) -> None:
        """To the socket, where it takes them now, or to the writer. Called with the lock held."""
        if self._queued or not _is_small(frames) or self._closed:
            self._queued += 1
            self._outgoing.put(frames)
            return
        for parts in self._encode(frames):
            rest = self._send_now(parts) if not self._queued else parts
            if rest:
                self._queued += 1
                self._outgoing.put(b"".join(rest))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._outgoing.put(None)
            wire = self._wire
        if wire is not None:
            wire.end()
        if self.fast_path is not None:
            self.fast_path.close()

    # ConnectionReceiver

    def show(self, header: Header, place: Place) -> Buffer | None:
        return self._receiver.admit(header, self._shared().show(header, place))

    def freed(self, place: Place) -> None:
        self._shared().freed(place)

    def _shared(self) -> SharedMemory:
        if self._memory is None:
            raise FrameError("a frame is about shared memory; this connection has none")
        return self._memory

    def ended(self, payload: bytes) -> None:
        detail = ErrorDetail.FromString(payload)
        reason = f"the session with the server ended: {detail.message}"
        self._end = from_status(detail.code, reason, detail.retry_delay_ms / _MS_PER_S)

    # Writing

    def _encode(self, frames: Sequence[Outbound]) -> Iterator[list[Part]]:
        back = self._memory.returned() if self._memory is not None else ()
        freed: list[Outbound] = [(Header(FrameType.FREE), place.pack()) for place in back]
        return map(joined, self._encoder.gathered(self._placed(freed + list(frames))))

    def _placed(self, frames: Sequence[Outbound]) -> Iterator[Outbound]:
        """Tensors as their places, where shared memory takes them."""
        for header, payload in frames:
            if self._memory is None or isinstance(payload, bytes | Place):
                yield header, payload
            else:
                yield header, self._memory.put(payload.view()) or payload

    def _send_now(self, parts: list[Part]) -> list[Part]:
        """Sends what the socket takes at once, and returns the rest."""
        assert self._wire is not None  # noqa: S101  # nothing is sent before
        try:
            return self._wire.send_now(parts)
        except OSError:  # the reader hears of it
            return []

    def _write(self, wire: Wire) -> None:
        while (batch := self._outgoing.get()) is not None and not self._closed:
            try:
                if isinstance(batch, bytes):
                    wire.send([batch])
                else:
                    for parts in self._encode(batch):
                        wire.send(parts)
            except OSError:  # the reader hears of it
                return
            except Exception as error:  # a source that cannot be read: every waiter would hang
                self._end = ServerUnavailable(f"a request could not be sent: {error!r}")
                self.close()
                return
            with self._lock:
                self._queued -= 1

    # Reading

    def _read(self) -> None:
        end: KtExpertError = ServerUnavailable("the server ended the session")
        what = self._connector.what
        try:
            self._serve(self._open())
        except NotPossibleError as error:
            end = self._connector.on_refusal(str(error)) or ServerUnavailable(f"no connection {what}: {error}")
        except grpc.RpcError as error:
            end = from_rpc(error, f"the server was asked for a connection {what}")
        except OSError as error:
            if self._wire is None:
                self._connector.on_connected(False)
            end = ServerUnavailable(f"the connection {what} ended: {error}")
        except FrameError as error:
            end = ServerFault(f"the server sent a malformed frame: {error}")
        except Exception as error:  # every waiter must hear of it, whatever it is
            end = ServerFault(f"an answer of the server could not be taken: {error!r}")
        self._decoder.close()
        if self._closed and self._end is None:
            end = ServerUnavailable("the session was closed by this trainer")
        self.close()
        if self._wire is not None:
            self._wire.close()
        if self.fast_path is not None:
            self.fast_path.close()
        with self._lock:
            self._memory = None  # but for what tensors have of it
        self._receiver.on_end(self._end or end)

    def _open(self) -> Wire:
        connected = self._connector.connect()
        wire = connected.wire
        self._connector.on_connected(True)
        with self._lock:
            self._wire, self._memory, self.fast_path = wire, connected.memory, connected.fast_path
            self._encoder = Encoder(checksum=not wire.has_checksums)
            if self._closed:
                raise ConnectionResetError("closed while it was opened")
            self._queued -= 1
        threading.Thread(target=self._write, args=(wire,), name="kt-expert-writer", daemon=True).start()
        return wire

    def _serve(self, wire: Wire) -> None:
        messages = Messages(self._decoder)
        while True:
            if self._quiet and not wire.has_input(_MAX_QUIET_MS):
                with self._lock:
                    self._flush()
            size = wire.receive_into(messages.room())
            if not size:
                return
            for message in messages.received(size):
                self._decoder.feed(message)


def _is_small(frames: Sequence[Outbound]) -> bool:
    """Whether sending them takes about as long as waking a thread."""
    sources = [(header, payload) for header, payload in frames if not isinstance(payload, bytes | Place)]
    return sum(header.tensor_bytes for header, _ in sources) <= _AT_ONCE_BYTES and all(each.is_ready for _, each in sources)
