"""An HTTP proxy as companies have them: it takes CONNECT, and knows where the names of its network lead."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from support.sockets import connections

_CHUNK = 65536
_MOST_HEADER_BYTES = 8192


class ConnectProxy:
    """Leads connections to the names it knows to `target` (host:port), and refuses all others."""

    def __init__(self, target: str, name: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target, self._name = (host, int(port)), name
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: list[str] = []  # what CONNECT was for
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> ConnectProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        for inner in connections(self._listener):
            threading.Thread(target=self._serve, args=(inner,), daemon=True).start()

    def _serve(self, inner: socket.socket) -> None:
        with inner, suppress(OSError):
            header = b""
            while b"\r\n\r\n" not in header and len(header) < _MOST_HEADER_BYTES:
                header += inner.recv(_CHUNK)
            method, wanted, *_ = header.decode().split()
            self.asked.append(f"{method} {wanted}")
            if wanted != self._name:
                inner.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                return
            with socket.create_connection(self._target) as outer:
                inner.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                back = threading.Thread(target=_pump, args=(outer, inner), daemon=True)
                back.start()
                _pump(inner, outer)
                back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(_CHUNK):
            sink.sendall(content)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
