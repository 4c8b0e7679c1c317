"""The server's certificate, key and authority of clients, as they are on disk now."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import grpc
from kt_expert_proto.data_plane import LEAST_TLS

from kt_expert_server.config import Security
from kt_expert_server.errors import InvalidRequest

Made = TypeVar("Made")


class TlsFiles:
    """Whose content may be exchanged at any time."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate, self._key, self._client_ca = certificate, key, client_ca
        self._paths = [path for path in (certificate, key, client_ca) if path is not None]
        self._seen = self._state()

    @classmethod
    def of(cls, security: Security) -> TlsFiles | None:
        """None without TLS. Raises InvalidRequest for files that cannot be read."""
        if security.certificate is None or security.key is None:
            return None
        return cls(security.certificate, security.key, security.client_ca)

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """For gRPC. Raises InvalidRequest."""
        try:
            certificate, key, *authority = [path.read_bytes() for path in self._paths]
        except OSError as error:
            raise InvalidRequest(f"TLS file {error.filename} cannot be read: {error.strerror}") from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority[0] if authority else None)

    def renewed(self, make: Callable[[], Made]) -> Made | None:
        """What `make` makes of them. None where nothing changed, or where the new files cannot be used: the old ones then stay,
        and the next call tries again."""
        try:
            state = self._state()
            if state == self._seen:
                return None
            made = make()
        except InvalidRequest:
            return None
        self._seen = state
        return made

    def context(self) -> ssl.SSLContext:
        """For sockets. Raises InvalidRequest."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = LEAST_TLS
        try:
            context.load_cert_chain(self._certificate, self._key, password="")  # never asked for on a terminal
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:
            named = ", ".join(map(str, self._paths))
            raise InvalidRequest(f"TLS files {named} cannot be used: {error}") from error
        return context

    def _state(self) -> list[tuple[int, int]]:
        try:
            return [(status.st_mtime_ns, status.st_ino) for status in map(os.stat, self._paths)]
        except OSError as error:
            raise InvalidRequest(f"TLS file {error.filename} cannot be read: {error.strerror}") from error
