"""Proxies in user space between trainer and server, which cut, hold back and damage what passes."""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from support.sockets import connections

_CHUNK = 65536
_DESCRIPTORS = 2  # that come with the shared memory
_LOOK_S = 0.02  # for sockets of servers that were started again


class _Faults:
    """What is done to connections that pass. Faults act on all there are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._damage: random.Random | None = None
        self.cuts = 0

    def cut(self) -> None:
        """Ends every connection, both ways, at once."""
        with self._lock:
            ending, self._open = self._open, set()
        self.cuts += bool(ending)
        for each in ending:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def hold(self) -> None:
        """Nothing passes any more, and nobody is told."""
        self._flowing.clear()

    def flow(self) -> None:
        self._flowing.set()

    def damage_next(self, seed: int) -> None:
        """Changes one byte of what passes next from the trainer."""
        self._damage = random.Random(seed)

    def _forward(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        for inner in connections(listener):
            try:
                outer = connect()
            except OSError:
                inner.close()
                continue
            outer.settimeout(None)
            with self._lock:
                self._open |= {inner, outer}
            for source, target, from_trainer in ((inner, outer, True), (outer, inner, False)):
                threading.Thread(target=self._pump, args=(source, target, from_trainer), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, from_trainer: bool) -> None:
        try:
            while True:
                data, descriptors = _received(source)
                if not data:
                    break
                self._flowing.wait()
                if from_trainer and self._damage is not None and len(data) > 1000:
                    rng, self._damage = self._damage, None
                    at = rng.randrange(len(data))
                    data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
                _send(target, data, descriptors)
        except OSError:
            pass
        finally:
            for each in (source, target):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
            with self._lock:
                self._open -= {source, target}


class FaultProxy(_Faults):
    """Listens on a free port and forwards to `target` (host:port)."""

    def __init__(self, target: str) -> None:
        super().__init__()
        host, port = target.rsplit(":", 1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

        def connect() -> socket.socket:
            return socket.create_connection((host, int(port)), timeout=5)

        threading.Thread(target=self._forward, args=(self._listener, connect), daemon=True).start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()


class SameHostProxy(_Faults):
    """Has in `directory` a socket for each that servers have in `servers`, with what is sent through it, descriptors too."""

    def __init__(self, servers: Path, directory: Path) -> None:
        super().__init__()
        self._servers, self.directory = servers, directory
        self._listeners: dict[str, socket.socket] = {}
        self._stop = threading.Event()
        directory.mkdir()
        self._look()
        self._thread = threading.Thread(target=self._keep_looking)
        self._thread.start()

    def __enter__(self) -> SameHostProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for each in self._listeners.values():
            each.close()
        self.cut()

    def _keep_looking(self) -> None:
        while not self._stop.wait(_LOOK_S):
            self._look()

    def _look(self) -> None:
        for path in self._servers.glob("*.sock"):
            if path.name not in self._listeners:
                listener = socket.socket(socket.AF_UNIX)
                listener.bind(str(self.directory / path.name))
                listener.listen()
                self._listeners[path.name] = listener

                def connect(path: Path = path) -> socket.socket:
                    connection = socket.socket(socket.AF_UNIX)
                    connection.connect(str(path))
                    return connection

                threading.Thread(target=self._forward, args=(listener, connect), daemon=True).start()


def _received(source: socket.socket) -> tuple[bytes, list[int]]:
    if source.family != socket.AF_UNIX:
        return source.recv(_CHUNK), []
    data, descriptors, _, _ = socket.recv_fds(source, _CHUNK, _DESCRIPTORS)
    return data, descriptors


def _send(target: socket.socket, data: bytes, descriptors: list[int]) -> None:
    if descriptors:
        sent = socket.send_fds(target, [data], descriptors)
        data = data[sent:]
        for each in descriptors:
            os.close(each)
    target.sendall(data)
