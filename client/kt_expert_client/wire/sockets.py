"""Sockets as a reading and a writing thread use them, plain and with TLS."""

from __future__ import annotations

import select
import socket
import ssl
import threading
from contextlib import suppress
from typing import Protocol

from kt_expert_proto.codec import Part
from kt_expert_proto.messages import rest_of

_LOOK_MS = 1000  # at most between two looks at a socket that another thread may have closed


class Wire(Protocol):
    """One thread receives; who sends holds a lock of its own. Every method may raise OSError."""

    has_checksums: bool  # what arrives is what was sent

    def receive_into(self, memory: memoryview) -> int:
        """Waits. How many bytes have come, 0 at the end."""

    def has_input(self, timeout_ms: int) -> bool:
        """Whether receive_into would not wait, within so long."""

    def send_now(self, parts: list[Part]) -> list[Part]:
        """Sends what is taken at once, and returns the rest, which has to be the next that is sent."""

    def send(self, parts: list[Part]) -> None:
        """Waits until all of it is taken."""

    def end(self) -> None:
        """Wakes whoever waits in another method; nothing passes any more."""

    def close(self) -> None: ...


class PlainWire:
    """Implements Wire for a socket that waits."""

    def __init__(self, connection: socket.socket, *, has_checksums: bool) -> None:
        self.socket, self.has_checksums = connection, has_checksums
        self._coming = select.poll()
        self._coming.register(connection, select.POLLIN)

    def receive_into(self, memory: memoryview) -> int:
        return self.socket.recv_into(memory)

    def has_input(self, timeout_ms: int) -> bool:
        return bool(self._coming.poll(timeout_ms))

    def send_now(self, parts: list[Part]) -> list[Part]:
        try:
            return rest_of(parts, self.socket.sendmsg(parts, (), socket.MSG_DONTWAIT))
        except BlockingIOError:
            return parts

    def send(self, parts: list[Part]) -> None:
        while parts:
            parts = rest_of(parts, self.socket.sendmsg(parts))

    def end(self) -> None:
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


class TlsWire:
    """Implements Wire for an SSL socket. Two threads may not use one SSL object at a time, so the socket does not wait, the
    object is used under a lock, and whoever has to wait does so outside of it."""

    has_checksums = True

    def __init__(self, connection: ssl.SSLSocket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._lock = threading.Lock()

    def receive_into(self, memory: memoryview) -> int:
        while True:
            try:
                with self._lock:
                    return self._socket.recv_into(memory)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, _LOOK_MS)
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, _LOOK_MS)

    def has_input(self, timeout_ms: int) -> bool:
        with self._lock:
            if self._socket.pending():
                return True
        return self._wait(select.POLLIN, timeout_ms)

    def send_now(self, parts: list[Part]) -> list[Part]:
        try:
            while parts:
                with self._lock:
                    parts = rest_of(parts, self._socket.send(parts[0]))
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        return parts

    def send(self, parts: list[Part]) -> None:
        while parts := self.send_now(parts):
            self._wait(select.POLLOUT, _LOOK_MS)

    def end(self) -> None:
        with suppress(OSError):  # not SSLSocket's: that would let others see what is not decrypted
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _wait(self, event: int, timeout_ms: int) -> bool:
        descriptor = self._socket.fileno()
        if descriptor < 0:
            raise ConnectionResetError("the connection was closed")
        waiting = select.poll()
        waiting.register(descriptor, event)
        return bool(waiting.poll(timeout_ms))
