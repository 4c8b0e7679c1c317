"""What tests do with sockets of their own."""

from __future__ import annotations

import socket
from collections.abc import Iterator


def connections(listener: socket.socket) -> Iterator[socket.socket]:
    """What connects, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        yield connection


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
