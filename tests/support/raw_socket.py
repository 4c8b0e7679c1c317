"""A member that speaks raw frames over a socket beside gRPC."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator

from kt_expert_proto.codec import Decoder, Encoder
from kt_expert_proto.data_plane import MAGIC
from kt_expert_proto.handshake import ACCEPTED, CHALLENGE_BYTES, NONCE_BYTES, PROOF_BYTES, proof
from kt_expert_proto.header import FrameError, FrameType, Header
from kt_expert_proto.messages import Messages
from kt_expert_proto.shared import Place
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1.session_pb2 import ErrorDetail

from support.raw import TIMEOUT_S, Frame, RawMember, _Bytes, _Collector


class RawSocket(RawMember):
    """`connect` makes the connection."""

    checksum = False  # of what is sent

    def open(self) -> None:
        self.socket = self.connect()
        self.end: ErrorDetail | None = None
        self._encoder = Encoder(checksum=self.checksum)
        self._collector = _Collector()
        self._incoming = self._frames()

    def connect(self) -> socket.socket:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.channel.close()

    def send_bytes(self, message: bytes) -> None:
        self.socket.sendall(message)

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
        raise AssertionError((header, place))

    def freed(self, place: Place) -> None:
        raise AssertionError(place)

    def ended(self, payload: bytes) -> None:
        self.end = ErrorDetail.FromString(payload)

    def free(self, place: Place) -> None:
        self.send((Header(FrameType.FREE), place.pack()))


class RawDataPlane(RawSocket):
    """Over the server's data port, without TLS."""

    checksum = True

    def connect(self) -> socket.socket:
        return greet(self.offer(), self.host)

    @property
    def host(self) -> str:
        return "127.0.0.1"

    def offer(self) -> pb.DataPlaneOffer:
        offer: pb.DataPlaneOffer = self.stub.OfferDataPlane(pb.DataPlaneRequest(), metadata=self._metadata, timeout=TIMEOUT_S)
        return offer


def greet(offer: pb.DataPlaneOffer, host: str, *, secret: bytes | None = None) -> socket.socket:
    """Connects as the client does. Raises FrameError with the server's sentence where it refuses."""
    connection = socket.create_connection((host, offer.port), TIMEOUT_S)
    connection.sendall(MAGIC + offer.offer_id + secrets.token_bytes(CHALLENGE_BYTES))
    answer = b""
    while len(answer) < 1 + PROOF_BYTES + NONCE_BYTES:
        piece = connection.recv(1024)
        answer += piece
        if not piece or answer[:1] != ACCEPTED:
            connection.close()
            raise FrameError(answer[1:].decode())
    connection.sendall(proof(secret or offer.secret, b"client", answer[-NONCE_BYTES:]))
    return connection
