"""A member that speaks raw frames through shared memory, and can write there whatever it likes."""

from __future__ import annotations

import mmap
import os
import secrets
import socket
from collections.abc import Iterator

import numpy as np
from kt_expert_proto.codec import Decoder, Encoder
from kt_expert_proto.handshake import ACCEPTED, CHALLENGE_BYTES, NONCE_BYTES, proof
from kt_expert_proto.header import FrameError, FrameType, Header
from kt_expert_proto.messages import Messages
from kt_expert_proto.same_host import CONTROL_BYTES, MAGIC, region_bytes
from kt_expert_proto.shared import Place
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1.session_pb2 import ErrorDetail

from support.raw import TIMEOUT_S, Frame, RawMember, _Bytes, _Collector


class RawSameHost(RawMember):
    """`lent` are the places of the server's region that it was shown and has not given back."""

    def open(self) -> None:
        offer = self.stub.OfferSameHost(pb.SameHostRequest(), metadata=self._metadata, timeout=TIMEOUT_S)
        self.socket, self.descriptor = shake_hands(offer)
        self.region = region_bytes(self.descriptor)
        memory = np.frombuffer(mmap.mmap(self.descriptor, CONTROL_BYTES + 2 * self.region), np.uint8)
        self.outgoing, self.incoming = (
            memory[CONTROL_BYTES : CONTROL_BYTES + self.region],
            memory[CONTROL_BYTES + self.region :],
        )
        self.lent: list[Place] = []
        self.freed_places: list[Place] = []
        self.end: ErrorDetail | None = None
        self._encoder = Encoder(checksum=False)
        self._collector = _Collector()
        self._incoming = self._frames()

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        os.close(self.descriptor)
        self.channel.close()

    def send_bytes(self, message: bytes) -> None:
        self.socket.sendall(message)

    def put(self, content: np.ndarray, place: Place) -> Place:
        """Writes a tensor's bytes there."""
        raw = np.ascontiguousarray(content).view(np.uint8).reshape(-1)
        self.outgoing[place.offset : place.offset + raw.nbytes] = raw
        return place

    def _frames(self) -> Iterator[Frame]:
        decoder: Decoder[_Bytes] = Decoder(self._collector, self)
        messages = Messages(decoder)
        while size := self.socket.recv_into(messages.room()):
            for message in messages.received(size):
                decoder.feed(message)
                frames, self._collector.frames = self._collector.frames, []
                yield from frames

    def ended_with(self) -> ErrorDetail:
        """The error that ended the stream."""
        for _ in self._incoming:
            pass
        assert self.end is not None, "the stream ended without an error"
        return self.end

    # ConnectionReceiver

    def show(self, header: Header, place: Place) -> _Bytes:
        self.lent.append(place)
        buffer = _Bytes(header.tensor_bytes)
        buffer.view[:] = self.incoming[place.offset : place.offset + header.tensor_bytes].data
        return buffer

    def freed(self, place: Place) -> None:
        self.freed_places.append(place)

    def ended(self, payload: bytes) -> None:
        self.end = ErrorDetail.FromString(payload)

    def free(self, place: Place) -> None:
        self.send((Header(FrameType.FREE), place.pack()))


def shake_hands(offer: pb.SameHostOffer, *, secret: bytes | None = None) -> tuple[socket.socket, int]:
    """Connects as the client does. Raises FrameError with the server's sentence where it refuses."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    connection.connect(offer.socket_path)
    connection.sendall(MAGIC + offer.offer_id + secrets.token_bytes(CHALLENGE_BYTES))
    answer, descriptors, _, _ = socket.recv_fds(connection, 1024, 1)
    if answer[:1] != ACCEPTED:
        connection.close()
        raise FrameError(answer[1:].decode())
    nonce = os.pread(descriptors[0], NONCE_BYTES, 0)
    connection.sendall(proof(secret or offer.secret, b"client", nonce))
    return connection, descriptors[0]
