"""What a trainer shows a server, and what it asks the server to show."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import grpc
from kt_expert_proto.channel import CLIENT_OPTIONS, Options

from kt_expert_client.address import ServerAddress
from kt_expert_client.errors import InvalidRequest
from kt_expert_client.wire.grpc_stream import Metadata

_NO_PROXY: Options = (("grpc.enable_http_proxy", 0),)


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files: the token, the authority that signed the server's certificate (default: the system's), own certificate and key."""

    token_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def from_environment(cls) -> Credentials:
        """KT_EXPERT_TOKEN_FILE, KT_EXPERT_CA, KT_EXPERT_CERT and KT_EXPERT_KEY, where they are set."""
        names = ("KT_EXPERT_TOKEN_FILE", "KT_EXPERT_CA", "KT_EXPERT_CERT", "KT_EXPERT_KEY")
        return cls(*(Path(os.environ[name]) if os.environ.get(name) else None for name in names))


def open_channel(address: ServerAddress, credentials: Credentials) -> tuple[grpc.Channel, Metadata]:
    """A channel, and what every call on it carries. Raises InvalidRequest for files that cannot be read, for a token that would
    travel in the clear, and for certificates where the address does not ask for TLS."""
    metadata: Metadata = ()
    if credentials.token_file is not None:
        if not address.secure and not address.is_local:
            raise InvalidRequest(
                f"a token would travel to {address.text} in the clear; write grpcs://{address.target}, or leave the token out"
            )
        metadata = (("authorization", f"Bearer {_read(credentials.token_file).decode().strip()}"),)
    options = CLIENT_OPTIONS + (_NO_PROXY if address.is_local else ())
    files = (credentials.ca, credentials.certificate, credentials.key)
    if not address.secure:
        if any(files):
            raise InvalidRequest(
                f"certificates are given for {address.text}, which is without TLS; write grpcs://{address.target}"
            )
        return grpc.insecure_channel(address.target, options=options), metadata
    if (credentials.certificate is None) != (credentials.key is None):
        raise InvalidRequest("a client's certificate and its key belong together; give both")
    authority, certificate, key = (None if path is None else _read(path) for path in files)
    tls = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(address.target, tls, options=options), metadata


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
