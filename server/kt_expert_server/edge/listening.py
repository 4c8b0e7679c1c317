"""Binding the gRPC port: where, with what protection, and never half."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc

from kt_expert_server.config import Address, Security
from kt_expert_server.errors import InvalidRequest, ListenError

_REASONS = {
    errno.EADDRINUSE: "the port is in use",
    errno.EADDRNOTAVAIL: "no interface of this machine has that address",
    errno.EACCES: "this user may not bind that port",
}


def is_loopback(address: Address) -> bool:
    """Whether only this machine reaches it."""
    if address.path:
        return True
    try:
        return all(ipaddress.ip_address(host).is_loopback for host in _resolve(address))
    except ListenError:
        return False


def check_security(address: Address, security: Security) -> None:
    """Raises InvalidRequest for an address that others reach without protection, or a token that would travel in the clear."""
    local = is_loopback(address)
    has_tls = security.certificate is not None
    if security.token_file is not None and not has_tls and not local:
        raise InvalidRequest(
            f"--token-file without TLS on {address}: tokens would travel in the clear; give --tls-cert and --tls-key too"
        )
    if local or security.allow_remote or (has_tls and security.token_file is not None):
        return
    raise InvalidRequest(
        f"--listen {address} can be reached from other machines; give --tls-cert, --tls-key and --token-file, or say "
        "--insecure-allow-remote if everybody on that network may train and read adapters"
    )


def bind(server: grpc.aio.Server, address: Address, security: Security) -> Address:
    """Binds every address the name stands for, all or none. Returns it with the port. Raises ListenError."""
    credentials = _credentials(security)
    if address.path:
        _prepare_socket(Path(address.path))
        _add(server, f"unix:{address.path}", address, credentials)
        os.chmod(address.path, stat.S_IRUSR | stat.S_IWUSR)
        return address
    port = address.port
    for host in _resolve(address):
        _probe(host, port, address)
        shown = f"[{host}]" if ":" in host else host
        port = _add(server, f"{shown}:{port}", address, credentials)
    return Address(address.host, port)


def _resolve(address: Address) -> list[str]:
    """Numeric addresses of the host, without repetition. Raises ListenError."""
    try:
        found = socket.getaddrinfo(address.bare_host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ListenError(f"cannot listen on {address}: the host name is not known ({error})") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _probe(host: str, port: int, address: Address) -> None:
    """gRPC says only that it failed; the socket says why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except OSError as error:
            reason = _REASONS.get(error.errno or 0, error.strerror)
            raise ListenError(f"cannot listen for gRPC on {address} ({host}): {reason}") from error


def _add(server: grpc.aio.Server, target: str, address: Address, credentials: grpc.ServerCredentials | None) -> int:
    try:
        if credentials is None:
            return server.add_insecure_port(target)
        return server.add_secure_port(target, credentials)
    except RuntimeError as error:
        raise ListenError(f"cannot listen for gRPC on {address}: {error}") from error


def _prepare_socket(path: Path) -> None:
    """Removes a socket nobody listens on any more. Raises ListenError for one that is in use, or for another file."""
    if not path.exists():
        if not path.parent.is_dir():
            raise ListenError(f"cannot listen on unix:{path}: there is no directory {path.parent}")
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ListenError(f"cannot listen on unix:{path}: there is a file of that name that is no socket")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            path.unlink()
            return
    raise ListenError(f"cannot listen on unix:{path}: another server does")


def _credentials(security: Security) -> grpc.ServerCredentials | None:
    """Read anew for every connection whose files have changed. Raises InvalidRequest for files that cannot be read."""
    if security.certificate is None or security.key is None:
        return None
    files = _TlsFiles(security.certificate, security.key, security.client_ca)
    changed = cast("Callable[[], grpc.ServerCertificateConfiguration]", files.changed)  # None is allowed; the stubs lack it
    return grpc.dynamic_ssl_server_credentials(
        files.configuration(), changed, require_client_authentication=security.client_ca is not None
    )


class _TlsFiles:
    """Certificate, key and the authority of clients, as they are on disk."""

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._paths = [path for path in (certificate, key, client_ca) if path is not None]
        self._has_ca = client_ca is not None
        self._seen = self._state()

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        try:
            certificate, key, *authority = [path.read_bytes() for path in self._paths]
        except OSError as error:
            raise InvalidRequest(f"TLS file {error.filename} cannot be read: {error.strerror}") from error
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority[0] if self._has_ca else None)

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """None where nothing changed, or where the new files cannot be read: the old ones then stay."""
        try:
            state = self._state()
            if state == self._seen:
                return None
            configuration = self.configuration()
        except (OSError, InvalidRequest):
            return None
        self._seen = state
        return configuration

    def _state(self) -> list[tuple[int, int]]:
        try:
            return [(status.st_mtime_ns, status.st_ino) for status in map(os.stat, self._paths)]
        except OSError as error:
            raise InvalidRequest(f"TLS file {error.filename} cannot be read: {error.strerror}") from error
