"""Which transport a client's sessions use: shared memory where the server is on this host, else a stream over gRPC."""

from __future__ import annotations

import logging
import os

import grpc
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc

from kt_expert_client.errors import InvalidRequest, KtExpertError
from kt_expert_client.wire.base import Receiver, Transport
from kt_expert_client.wire.grpc_stream import GrpcStreamTransport, Metadata
from kt_expert_client.wire.same_host import SameHostOpener, SameHostTransport

TRANSPORT_VARIABLE = "KT_EXPERT_TRANSPORT"
DIRECTORY_VARIABLE = "KT_EXPERT_SAME_HOST_DIR"  # where this process sees the directory of the server's socket, if elsewhere
AUTO, STREAM, SAME_HOST = "auto", "stream", "same-host"
_KNOWN = (AUTO, STREAM, SAME_HOST)
_ASK_TIMEOUT_S = 20.0
_MOST_FAILURES = 3
_log = logging.getLogger(__name__)


class Transports:
    """Implements Opener. With `auto` the first refusal of shared memory is logged, and the stream is used from then on."""

    def __init__(self, channel: grpc.Channel, metadata: Metadata, wanted: str | None) -> None:
        """`wanted` defaults to the environment's, and that to auto. Raises InvalidRequest for one there is not."""
        self._wanted = wanted or os.environ.get(TRANSPORT_VARIABLE, AUTO)
        if self._wanted not in _KNOWN:
            given = f"transport is {wanted!r}" if wanted else f"{TRANSPORT_VARIABLE} is {self._wanted!r}"
            raise InvalidRequest(f"{given}, expected one of {', '.join(_KNOWN)}")
        self._channel, self._metadata = channel, metadata
        self._stub = service_pb2_grpc.ExpertStub(channel)
        self._opener = SameHostOpener(self._ask, self._refused, self._connected)
        self._failures = 0  # handshakes in a row that did not come to their end
        self.name = STREAM if self._wanted == STREAM else SAME_HOST

    def __call__(self, receiver: Receiver) -> Transport:
        if self.name == STREAM:
            return GrpcStreamTransport(self._channel, self._metadata, receiver)
        return SameHostTransport(self._opener, receiver)

    def _ask(self) -> pb.SameHostOffer:
        offer: pb.SameHostOffer = self._stub.OfferSameHost(
            pb.SameHostRequest(), timeout=_ASK_TIMEOUT_S, metadata=self._metadata
        )
        if offer.socket_path and DIRECTORY_VARIABLE in os.environ:
            offer.socket_path = os.path.join(os.environ[DIRECTORY_VARIABLE], os.path.basename(offer.socket_path))
        return offer

    def _connected(self, succeeded: bool) -> None:
        self._failures = 0 if succeeded else self._failures + 1
        if self._failures >= _MOST_FAILURES:  # a server that was killed meanwhile is rarely met twice
            self._refused(f"{self._failures} connections in a row ended before memory was shared")

    def _refused(self, reason: str) -> KtExpertError | None:
        if self._wanted == SAME_HOST:
            return InvalidRequest(
                f"transport is {SAME_HOST!r} and memory cannot be shared with the server: {reason}; use {AUTO!r} or {STREAM!r}",
                is_answer=True,
            )
        if self.name == SAME_HOST:
            self.name = STREAM
            _log.info("the server is reached through a stream and not through shared memory: %s", reason)
        return None
