"""Binding ports: where, with what protection, and never half."""

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
from kt_expert_server.edge.tls import TlsFiles
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


def check_security(address: Address, security: Security, option: str = "--listen") -> None:
    """Raises InvalidRequest for an address that others reach without protection, or a token that would travel in the clear.
    `option` is what gave the address."""
    local = is_loopback(address)
    has_tls = security.certificate is not None
    if security.token_file is not None and not has_tls and not local:
        raise InvalidRequest(
            f"--token-file without TLS on {address}: tokens would travel in the clear; give --tls-cert and --tls-key too"
        )
    if local or security.allow_remote or (has_tls and security.token_file is not None):
        return
    raise InvalidRequest(
        f"{option} {address} can be reached from other machines; give --tls-cert, --tls-key and --token-file, or say "
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


def listen(address: Address, backlog: int) -> tuple[list[socket.socket], Address]:
    """Sockets that do not wait, on every address the name stands for, all or none, and the address with the port. Raises
    ListenError."""
    made: list[socket.socket] = []
    port = address.port
    try:
        for host in _resolve(address):
            made.append(_listening(host, port, address, "data", backlog))
            made[-1].setblocking(False)
            port = made[-1].getsockname()[1]
    except ListenError:
        for each in made:
            each.close()
        raise
    return made, Address(address.host, port)


def _resolve(address: Address) -> list[str]:
    """Numeric addresses of the host, without repetition. Raises ListenError."""
    try:
        found = socket.getaddrinfo(address.bare_host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ListenError(f"cannot listen on {address}: the host name is not known ({error})") from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _probe(host: str, port: int, address: Address) -> None:
    """gRPC says only that it failed; the socket says why."""
    _listening(host, port, address, "gRPC", backlog=1).close()


def _listening(host: str, port: int, address: Address, what: str, backlog: int) -> socket.socket:
    """Raises ListenError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((host, port))
        made.listen(backlog)
    except OSError as error:
        made.close()
        reason = _REASONS.get(error.errno or 0, error.strerror)
        raise ListenError(f"cannot listen for {what} on {address} ({host}): {reason}") from error
    return made


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
    files = TlsFiles.of(security)
    if files is None:
        return None
    renew = cast("Callable[[], grpc.ServerCertificateConfiguration]", lambda: files.renewed(files.configuration))  # or None
    return grpc.dynamic_ssl_server_credentials(
        files.configuration(), renew, require_client_authentication=security.client_ca is not None
    )
