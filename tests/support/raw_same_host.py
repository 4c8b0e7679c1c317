"""A member that speaks raw frames through shared memory, and can write there whatever it likes."""

from __future__ import annotations

import mmap
import os
import secrets
import socket

import numpy as np
from kt_expert_proto.handshake import ACCEPTED, CHALLENGE_BYTES, NONCE_BYTES, proof
from kt_expert_proto.header import FrameError, Header
from kt_expert_proto.same_host import CONTROL_BYTES, MAGIC, region_bytes
from kt_expert_proto.shared import Place
from kt_expert_proto.v1 import service_pb2 as pb

from support.raw import TIMEOUT_S, _Bytes
from support.raw_socket import RawSocket


class RawSameHost(RawSocket):
    """`lent` are the places of the server's region that it was shown and has not given back."""

    def connect(self) -> socket.socket:
        offer = self.stub.OfferSameHost(pb.SameHostRequest(), metadata=self._metadata, timeout=TIMEOUT_S)
        connection, self.descriptor, self.fast_descriptor = shake_hands(offer)
        self.region = region_bytes(self.descriptor)
        memory = np.frombuffer(mmap.mmap(self.descriptor, CONTROL_BYTES + 2 * self.region), np.uint8)
        self.outgoing, self.incoming = (
            memory[CONTROL_BYTES : CONTROL_BYTES + self.region],
            memory[CONTROL_BYTES + self.region :],
        )
        self.lent: list[Place] = []
        self.freed_places: list[Place] = []
        return connection

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        os.close(self.descriptor)
        os.close(self.fast_descriptor)

    def put(self, content: np.ndarray, place: Place) -> Place:
        """Writes a tensor's bytes there."""
        raw = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
        self.outgoing[place.offset : place.offset + raw.nbytes] = raw
        return place

    # ConnectionReceiver

    def show(self, header: Header, place: Place) -> _Bytes:
        self.lent.append(place)
        buffer = _Bytes(header.tensor_bytes)
        buffer.view[:] = self.incoming[place.offset : place.offset + header.tensor_bytes].data
        return buffer

    def freed(self, place: Place) -> None:
        self.freed_places.append(place)


def shake_hands(offer: pb.SameHostOffer, *, secret: bytes | None = None) -> tuple[socket.socket, int, int]:
    """Connects as the client does. Raises FrameError with the server's sentence where it refuses."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    connection.connect(offer.socket_path)
    connection.sendall(MAGIC + offer.offer_id + secrets.token_bytes(CHALLENGE_BYTES))
    answer, descriptors, _, _ = socket.recv_fds(connection, 1024, 2)
    if answer[:1] != ACCEPTED:
        connection.close()
        raise FrameError(answer[1:].decode())
    nonce = os.pread(descriptors[0], NONCE_BYTES, 0)
    connection.sendall(proof(secret or offer.secret, b"client", nonce))
    return connection, descriptors[0], descriptors[1]
