"""A connection to a server on this host, and the memory that it shares."""

from __future__ import annotations

import os
import secrets
import socket

from kt_expert_proto.handshake import ACCEPTED, CHALLENGE_BYTES, MAX_REASON_BYTES, PROOF_BYTES, is_proof, proof
from kt_expert_proto.same_host import MAGIC
from kt_expert_proto.v1.service_pb2 import SameHostOffer

from kt_expert_client.wire.shared_memory import SharedMemory
from kt_expert_client.wire.socket_transport import NotPossibleError
from kt_expert_client.wire.sockets import PlainWire

WHAT = "on this host"
_HANDSHAKE_S = 10.0


def connect_same_host(offer: SameHostOffer) -> tuple[PlainWire, SharedMemory]:
    """Raises NotPossibleError, or OSError where the connection ended."""
    if not offer.socket_path:
        raise NotPossibleError(offer.reason)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_HANDSHAKE_S)
        try:
            connection.connect(offer.socket_path)
        except (FileNotFoundError, ConnectionRefusedError, PermissionError, NotADirectoryError) as error:
            raise NotPossibleError(
                f"its socket {offer.socket_path} is not to be reached from here: {error.strerror}"
            ) from error
        memory = _shake_hands(connection, offer)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return PlainWire(connection, has_checksums=True), memory  # memory of one machine is not a network


def _shake_hands(connection: socket.socket, offer: SameHostOffer) -> SharedMemory:
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    connection.sendall(MAGIC + offer.offer_id + challenge)
    answer, descriptors, _, _ = socket.recv_fds(connection, MAX_REASON_BYTES + 1, 1)
    if not answer:
        raise ConnectionResetError("the server closed the connection in the middle of the handshake")
    if answer[:1] != ACCEPTED or len(answer) != 1 + PROOF_BYTES or not descriptors:
        for each in descriptors:
            os.close(each)
        raise NotPossibleError(f"the server refused: {answer[1:].decode(errors='replace')}")
    try:
        memory = SharedMemory(descriptors[0])
    except ValueError as error:
        raise NotPossibleError(str(error)) from error
    if not is_proof(answer[1:], offer.secret, b"server", challenge):
        raise NotPossibleError(f"who listens at {offer.socket_path} is not the server that made the offer")
    connection.sendall(proof(offer.secret, b"client", memory.nonce))
    return memory
