"""Frames over a unix socket, tensors through memory that the server sees too: for a trainer on the server's host."""

from __future__ import annotations

import os
import queue
import secrets
import select
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import grpc
from kt_expert_proto.codec import Buffer, Decoder, Encoder, Messages, Outbound
from kt_expert_proto.header import FrameError, FrameType, Header
from kt_expert_proto.same_host import (
    ACCEPTED,
    CHALLENGE_BYTES,
    MAGIC,
    MAX_REASON_BYTES,
    PROOF_BYTES,
    is_proof,
    proof,
)
from kt_expert_proto.shared import Place
from kt_expert_proto.v1.service_pb2 import SameHostOffer
from kt_expert_proto.v1.session_pb2 import ErrorDetail

from kt_expert_client.errors import KtExpertError, ServerFault, ServerUnavailable, from_rpc, from_status
from kt_expert_client.wire.base import MAX_QUIET_S, Receiver, is_quiet
from kt_expert_client.wire.shared_memory import SharedMemory

_HANDSHAKE_S = 10.0
_MS_PER_S = 1000
_MAX_QUIET_MS = round(MAX_QUIET_S * _MS_PER_S)
# A request up to this size is put into shared memory and sent by its caller; a larger one is copied by a thread meanwhile.
_AT_ONCE_BYTES = 256 * 1024


class NotThisHostError(Exception):
    """Why memory cannot be shared with the server, so that trying again is of no use."""


def _connect(offer: SameHostOffer) -> tuple[socket.socket, SharedMemory]:
    """Raises NotThisHostError, or OSError where the connection ended."""
    if not offer.socket_path:
        raise NotThisHostError(offer.reason)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_HANDSHAKE_S)
        try:
            connection.connect(offer.socket_path)
        except (FileNotFoundError, ConnectionRefusedError, PermissionError, NotADirectoryError) as error:
            raise NotThisHostError(
                f"its socket {offer.socket_path} is not to be reached from here: {error.strerror}"
            ) from error
        memory = _shake_hands(connection, offer)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection, memory


def _shake_hands(connection: socket.socket, offer: SameHostOffer) -> SharedMemory:
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    connection.sendall(MAGIC + offer.offer_id + challenge)
    answer, descriptors, _, _ = socket.recv_fds(connection, MAX_REASON_BYTES + 1, 1)
    if not answer:
        raise ConnectionResetError("the server closed the connection in the middle of the handshake")
    if answer[:1] != ACCEPTED or len(answer) != 1 + PROOF_BYTES or not descriptors:
        for each in descriptors:
            os.close(each)
        raise NotThisHostError(f"the server refused: {answer[1:].decode(errors='replace')}")
    try:
        memory = SharedMemory(descriptors[0])
    except ValueError as error:
        raise NotThisHostError(str(error)) from error
    if not is_proof(answer[1:], offer.secret, b"server", challenge):
        raise NotThisHostError(f"who listens at {offer.socket_path} is not the server that made the offer")
    connection.sendall(proof(offer.secret, b"client", memory.nonce))
    return memory


@dataclass(frozen=True, slots=True)
class SameHostOpener:
    """`ask` gets an offer from the server; `on_refusal` hears why there can be no such connection, and says what is to be
    raised. None: another transport is tried next."""

    ask: Callable[[], SameHostOffer]
    on_refusal: Callable[[str], KtExpertError | None]
    on_connected: Callable[[bool], None]  # whether the handshake came to its end


class SameHostTransport:
    """Implements Transport and ConnectionReceiver. Small requests leave on their caller's thread, others on the writer's."""

    def __init__(self, opener: SameHostOpener, receiver: Receiver) -> None:
        self._opener, self._receiver = opener, receiver
        self._decoder: Decoder[Buffer] = Decoder(receiver, self)
        self._encoder = Encoder(checksum=False)
        self._outgoing: queue.SimpleQueue[Sequence[Outbound] | bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of whoever writes: frames leave in the order of the calls
        self._queued = 1  # batches that the writer has not sent; one until there is a connection
        self._quiet: list[Outbound] = []  # frames that wait for others to travel with
        self._closed = False
        self._socket: socket.socket | None = None
        self._memory: SharedMemory | None = None
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
        for message in self._encode(frames):
            rest = self._try(message) if not self._queued else message
            if rest:
                self._queued += 1
                self._outgoing.put(bytes(rest))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._outgoing.put(None)
            connection = self._socket
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # ConnectionReceiver

    def show(self, header: Header, place: Place) -> Buffer | None:
        assert self._memory is not None  # noqa: S101  # frames come after the handshake
        buffer = self._memory.show(header, place)
        return self._receiver.admit(header, buffer)

    def freed(self, place: Place) -> None:
        assert self._memory is not None  # noqa: S101
        self._memory.freed(place)

    def ended(self, payload: bytes) -> None:
        detail = ErrorDetail.FromString(payload)
        reason = f"the session with the server ended: {detail.message}"
        self._end = from_status(detail.code, reason, detail.retry_delay_ms / _MS_PER_S)

    # Writing

    def _encode(self, frames: Sequence[Outbound]) -> Iterator[bytes]:
        assert self._memory is not None  # noqa: S101
        back: list[Outbound] = [(Header(FrameType.FREE), place.pack()) for place in self._memory.returned()]
        yield from self._encoder.messages(self._placed(back + list(frames)))

    def _placed(self, frames: Sequence[Outbound]) -> Iterator[Outbound]:
        """Tensors as their places, where shared memory takes them."""
        assert self._memory is not None  # noqa: S101
        for header, payload in frames:
            if isinstance(payload, bytes | Place):
                yield header, payload
            else:
                yield header, self._memory.put(payload.view()) or payload

    def _try(self, message: bytes) -> bytes:
        """Sends what the socket takes at once, and returns the rest."""
        assert self._socket is not None  # noqa: S101
        try:
            return message[self._socket.send(message, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return message
        except OSError:  # the reader hears of it
            return b""

    def _write(self, connection: socket.socket) -> None:
        while (batch := self._outgoing.get()) is not None and not self._closed:
            try:
                for message in (batch,) if isinstance(batch, bytes) else self._encode(batch):
                    connection.sendall(message)
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
        try:
            self._serve(self._open())
        except NotThisHostError as error:
            reason = ServerUnavailable(f"memory cannot be shared with the server: {error}")
            end = self._opener.on_refusal(str(error)) or reason
        except grpc.RpcError as error:
            end = from_rpc(error, "the server was asked for a connection on this host")
        except OSError as error:
            if self._memory is None:
                self._opener.on_connected(False)
            end = ServerUnavailable(f"the connection to the server on this host ended: {error}")
        except FrameError as error:
            end = ServerFault(f"the server sent a malformed frame: {error}")
        except Exception as error:  # every waiter must hear of it, whatever it is
            end = ServerFault(f"an answer of the server could not be taken: {error!r}")
        self._decoder.close()
        if self._closed and self._end is None:
            end = ServerUnavailable("the session was closed by this trainer")
        self.close()
        if self._socket is not None:
            self._socket.close()
        with self._lock:
            self._memory = None  # but for what tensors have of it
        self._receiver.on_end(self._end or end)

    def _open(self) -> socket.socket:
        connection, memory = _connect(self._opener.ask())
        self._opener.on_connected(True)
        with self._lock:
            self._socket, self._memory = connection, memory
            if self._closed:
                raise ConnectionResetError("closed while it was opened")
            self._queued -= 1
        threading.Thread(target=self._write, args=(connection,), name="kt-expert-writer", daemon=True).start()
        return connection

    def _serve(self, connection: socket.socket) -> None:
        messages, coming = Messages(), select.poll()
        coming.register(connection, select.POLLIN)
        while True:
            if self._quiet and not coming.poll(_MAX_QUIET_MS):
                with self._lock:
                    self._flush()
            size = connection.recv_into(messages.room())
            if not size:
                return
            for message in messages.received(size):
                self._decoder.feed(message)


def _is_small(frames: Sequence[Outbound]) -> bool:
    """Whether sending them takes about as long as waking a thread."""
    sources = [(header, payload) for header, payload in frames if not isinstance(payload, bytes | Place)]
    return sum(header.tensor_bytes for header, _ in sources) <= _AT_ONCE_BYTES and all(each.is_ready for _, each in sources)
