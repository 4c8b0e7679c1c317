"""A proxy in user space between trainer and server, which cuts, holds back and damages what passes."""

from __future__ import annotations

import random
import socket
import threading
from contextlib import suppress

from support.sockets import connections

_CHUNK = 65536


class FaultProxy:
    """Listens on a free port and forwards to `target` (host:port). Faults act on all connections there are."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._damage: random.Random | None = None
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.cut()

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

    def _accept(self) -> None:
        for inner in connections(self._listener):
            try:
                outer = socket.create_connection(self._target, timeout=5)
            except OSError:
                inner.close()
                continue
            outer.settimeout(None)
            with self._lock:
                self._open |= {inner, outer}
            threading.Thread(target=self._pump, args=(inner, outer, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(outer, inner, False), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, from_trainer: bool) -> None:
        try:
            while data := source.recv(_CHUNK):
                self._flowing.wait()
                if from_trainer and self._damage is not None and len(data) > 1000:
                    rng, self._damage = self._damage, None
                    at = rng.randrange(len(data))
                    data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
                target.sendall(data)
        except OSError:
            pass
        finally:
            for each in (source, target):
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
            with self._lock:
                self._open -= {source, target}
