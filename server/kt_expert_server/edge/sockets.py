"""Sockets that never wait, plain and with TLS, and how a task waits for them."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from kt_expert_proto.codec import Part
from kt_expert_proto.handshake import MAX_REASON_BYTES, REFUSED
from kt_expert_proto.messages import rest_of


class Wire(Protocol):
    """Bytes there and back."""

    has_checksums: bool  # what arrives is what was sent
    keeps_bytes: bool  # the socket may be empty while bytes that have come are still to be received

    def fileno(self) -> int: ...

    def receive_into(self, memory: memoryview) -> int:
        """How many bytes have come, 0 at the end. Raises BlockingIOError where none are there, OSError."""

    def send(self, parts: list[Part]) -> list[Part]:
        """Sends what is taken now, and returns the rest, which has to be the next that is sent. Raises OSError."""


class PlainWire:
    """Implements Wire for a socket that does not wait."""

    keeps_bytes = False

    def __init__(self, connection: socket.socket, *, has_checksums: bool) -> None:
        self.socket, self.has_checksums = connection, has_checksums

    def fileno(self) -> int:
        return self.socket.fileno()

    def receive_into(self, memory: memoryview) -> int:
        return self.socket.recv_into(memory)

    def send(self, parts: list[Part]) -> list[Part]:
        try:
            return rest_of(parts, self.socket.sendmsg(parts))
        except BlockingIOError:
            return parts


class TlsWire:
    """Implements Wire for an SSL socket that does not wait."""

    has_checksums, keeps_bytes = True, True

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive_into(self, memory: memoryview) -> int:
        try:
            return self._socket.recv_into(memory)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def send(self, parts: list[Part]) -> list[Part]:
        while parts:
            try:
                parts = rest_of(parts, self._socket.send(parts[0]))
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                break
        return parts

    def close(self) -> None:
        self._socket.close()


# Waiting, for handshakes


async def receive(wire: Wire, size: int) -> bytes:
    """Raises ConnectionResetError where the other end closes before."""
    memory = memoryview(bytearray(size))
    received = 0
    while received < size:
        try:
            come = wire.receive_into(memory[received:])
        except BlockingIOError:
            await _until_readable(wire.fileno())
            continue
        if not come:
            raise ConnectionResetError("closed in the middle of the handshake")
        received += come
    return bytes(memory)


async def begin_tls(connection: socket.socket, context: ssl.SSLContext) -> TlsWire:
    """The server's side of TLS's handshake. The wire has the socket then. Raises OSError."""
    secured = context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
    try:
        await _shake_hands(secured)
    except BaseException:
        secured.close()
        raise
    return TlsWire(secured)


async def _shake_hands(secured: ssl.SSLSocket) -> None:
    while True:
        try:
            secured.do_handshake()
        except ssl.SSLWantReadError:
            await _until_readable(secured.fileno())
        except ssl.SSLWantWriteError:
            await _until_writable(secured.fileno())
        else:
            return


def refuse(wire: Wire, reason: str) -> None:
    """Says why; a socket that has sent nothing yet takes so little at once."""
    with suppress(OSError):
        wire.send([REFUSED + reason.encode()[:MAX_REASON_BYTES]])


async def _until_readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    await _until(lambda on_ready: loop.add_reader(descriptor, on_ready), lambda: loop.remove_reader(descriptor))


async def _until_writable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    await _until(lambda on_ready: loop.add_writer(descriptor, on_ready), lambda: loop.remove_writer(descriptor))


async def _until(begin: Callable[[Callable[[], None]], object], end: Callable[[], object]) -> None:
    ready = asyncio.Event()
    begin(ready.set)
    try:
        await ready.wait()
    finally:
        end()
