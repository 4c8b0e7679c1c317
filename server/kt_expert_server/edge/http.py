"""/metrics, /livez and /readyz on a port of their own.

Three fixed GET pages do not need a web framework; the request line is all that is read of a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kt_expert_server.config import Address
from kt_expert_server.errors import ListenError
from kt_expert_server.members.core import State

_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TEXT_TYPE = "text/plain; charset=utf-8"
_MAX_HEAD_BYTES = 16 * 1024
_READ_TIMEOUT_S = 10.0
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


class ObserveServer:
    """Liveness inspects nothing: a process that answers is alive. Readiness is the core's state."""

    def __init__(self, state: Callable[[], State], render_metrics: Callable[[], bytes]) -> None:
        self._state = state
        self._render = render_metrics
        self._server: asyncio.Server | None = None

    async def start(self, address: Address) -> Address:
        """Listens and returns the bound address. Raises ListenError."""
        try:
            self._server = await asyncio.start_server(
                self._serve, address.bare_host, address.port, limit=_MAX_HEAD_BYTES, reuse_port=False
            )
        except OSError as error:
            raise ListenError(f"cannot listen for metrics on {address}: {error.strerror or error}") from error
        return Address(address.host, self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _READ_TIMEOUT_S)
            status, kind, body = self._answer(head)
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            status, kind, body = 400, _TEXT_TYPE, b"expected an HTTP request\n"
        reply = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        try:
            writer.write(reply.encode("ascii") + body)
            await asyncio.wait_for(writer.drain(), _READ_TIMEOUT_S)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, head: bytes) -> tuple[int, str, bytes]:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3:
            return 400, _TEXT_TYPE, b"expected an HTTP request line\n"
        if words[0] not in (b"GET", b"HEAD"):
            return 405, _TEXT_TYPE, b"only GET is served\n"
        match words[1].split(b"?", 1)[0]:
            case b"/metrics":
                return 200, _METRICS_TYPE, self._render()
            case b"/livez" | b"/healthz":
                return 200, _TEXT_TYPE, b"alive\n"
            case b"/readyz":
                state = self._state()
                return (200 if state is State.READY else 503), _TEXT_TYPE, f"{state.value}\n".encode()
        return 404, _TEXT_TYPE, b"pages: /metrics /livez /readyz\n"
