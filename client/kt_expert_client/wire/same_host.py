"""A connection to a server on this host, and the memory that it shares."""

from __future__ import annotations

import os
import secrets
import socket

from kt_expert_proto.handshake import ACCEPTED, CHALLENGE_BYTES, MAX_REASON_BYTES, PROOF_BYTES, is_proof, proof
from kt_expert_proto.same_host import MAGIC
from kt_expert_proto.v1.service_pb2 import SameHostOffer

from kt_expert_client.wire.fast_path import FastPath
from kt_expert_client.wire.shared_memory import SharedMemory
from kt_expert_client.wire.socket_transport import Connected, NotPossibleError
from kt_expert_client.wire.sockets import PlainWire

WHAT = "on this host"
_HANDSHAKE_S = 10.0
_DESCRIPTORS = 2  # the memory, and an end for small forwards


def connect_same_host(offer: SameHostOffer, spin_s: float) -> Connected:
    """`spin_s`: how long a small forward looks for its answer before it sleeps. Raises NotPossibleError, or OSError where the
    connection ended."""
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
        memory, descriptor = _shake_hands(connection, offer)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    wire = PlainWire(connection, has_checksums=True)  # memory of one machine is not a network
    return Connected(wire, memory, FastPath(descriptor, spin_s))


def _shake_hands(connection: socket.socket, offer: SameHostOffer) -> tuple[SharedMemory, int]:
    """The memory, and the descriptor of the trainer's end for small forwards."""
    challenge = secrets.token_bytes(CHALLENGE_BYTES)
    connection.sendall(MAGIC + offer.offer_id + challenge)
    answer, descriptors, _, _ = socket.recv_fds(connection, MAX_REASON_BYTES + 1, _DESCRIPTORS)
    if not answer:
        raise ConnectionResetError("the server closed the connection in the middle of the handshake")
    if answer[:1] != ACCEPTED or len(answer) != 1 + PROOF_BYTES or len(descriptors) != _DESCRIPTORS:
        for each in descriptors:
            os.close(each)
        raise NotPossibleError(f"the server refused: {answer[1:].decode(errors='replace')}")
    try:
        memory = _memory(connection, offer, answer[1:], challenge, descriptors[0])
    except BaseException:
        os.close(descriptors[1])
        raise
    return memory, descriptors[1]


def _memory(
    connection: socket.socket, offer: SameHostOffer, given: bytes, challenge: bytes, descriptor: int
) -> SharedMemory:  # fmt: skip
    """Once both ends have proved who they are. Takes the descriptor."""
    try:
        memory = SharedMemory(descriptor)
    except ValueError as error:
        raise NotPossibleError(str(error)) from error
    if not is_proof(given, offer.secret, b"server", challenge):
        raise NotPossibleError(f"who listens at {offer.socket_path} is not the server that made the offer")
    connection.sendall(proof(offer.secret, b"client", memory.nonce))
    return memory
