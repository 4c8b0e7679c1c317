"""A TCP connection to a server's data port, beside gRPC."""

from __future__ import annotations

import secrets
import socket
import ssl

from kt_expert_proto.data_plane import LEAST_TLS, MAGIC, prepare
from kt_expert_proto.handshake import (
    ACCEPTED,
    CHALLENGE_BYTES,
    MAX_REASON_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    is_proof,
    proof,
)
from kt_expert_proto.v1.service_pb2 import DataPlaneOffer

from kt_expert_client.address import ServerAddress
from kt_expert_client.credentials import Credentials
from kt_expert_client.errors import InvalidRequest
from kt_expert_client.wire.socket_transport import Connected, NotPossibleError
from kt_expert_client.wire.sockets import PlainWire, TlsWire, Wire

WHAT = "to the server's data port"
_CONNECT_S = 3.0  # a firewall that drops what it does not know makes nobody wait longer
_HANDSHAKE_S = 10.0
_LOCAL = "localhost"  # where gRPC is reached through a unix socket


def tls_context(address: ServerAddress, credentials: Credentials) -> ssl.SSLContext | None:
    """What secures the connection, as gRPC's is; None for an address without TLS. Raises InvalidRequest for files that cannot
    be used."""
    if not address.secure:
        return None
    try:
        context = ssl.create_default_context(cafile=credentials.ca)
        context.minimum_version = LEAST_TLS
        if credentials.certificate is not None:
            context.load_cert_chain(credentials.certificate, credentials.key, password="")  # never asked for on a terminal
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"the files for TLS cannot be used: {error}") from error
    return context


class DataPlane:
    """Connects. The server's certificate has to be that of the address which the user named, wherever its data port is."""

    def __init__(self, address: ServerAddress, context: ssl.SSLContext | None) -> None:
        self._address, self._context = address, context
        self._was_reached = False

    def connect(self, offer: DataPlaneOffer) -> Connected:
        """Raises NotPossibleError, or OSError where the connection ended. Where it was possible before, whatever is the matter
        now may pass, and is an OSError too."""
        if not offer.port:
            raise NotPossibleError(offer.reason)
        try:
            wire = self._connect(offer.host or self._address.host or _LOCAL, offer)
        except NotPossibleError as error:
            if self._was_reached:
                raise ConnectionError(str(error)) from error
            raise
        self._was_reached = True
        return Connected(wire)

    def _connect(self, host: str, offer: DataPlaneOffer) -> Wire:
        try:
            connection = socket.create_connection((host, offer.port), _CONNECT_S)
        except OSError as error:
            raise NotPossibleError(f"its data port {host}:{offer.port} is not to be reached from here: {error}") from error
        try:
            return self._secure(connection, offer)
        except BaseException:
            connection.close()
            raise

    def _secure(self, connection: socket.socket, offer: DataPlaneOffer) -> Wire:
        prepare(connection)
        connection.settimeout(_HANDSHAKE_S)
        if self._context is None:
            _shake_hands(connection, offer)
            connection.settimeout(None)
            return PlainWire(connection, has_checksums=False)
        try:
            secured = self._context.wrap_socket(connection, server_hostname=self._address.host)
        except ssl.SSLCertVerificationError as error:
            raise NotPossibleError(f"the certificate of its data port is not trusted: {error.verify_message}") from error
        try:
            _shake_hands(secured, offer)
        except BaseException:
            secured.close()
            raise
        return TlsWire(secured)


def _shake_hands(connection: socket.socket, offer: DataPlaneOffer) -> None:
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    connection.sendall(MAGIC + offer.offer_id + challenge)
    verdict = _receive(connection, len(ACCEPTED))
    if verdict != ACCEPTED:
        raise NotPossibleError(f"the server refused: {connection.recv(MAX_REASON_BYTES).decode(errors='replace')}")
    given, nonce = _receive(connection, PROOF_BYTES), _receive(connection, NONCE_BYTES)
    if not is_proof(given, offer.secret, b"server", challenge):
        raise NotPossibleError("who listens at its data port is not the server that made the offer")
    connection.sendall(proof(offer.secret, b"client", nonce))


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        piece = connection.recv(size - len(received))
        if not piece:
            raise ConnectionResetError("the server closed the connection in the middle of the handshake")
        received += piece
    return received
