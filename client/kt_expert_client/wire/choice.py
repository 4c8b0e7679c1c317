"""Which transport a client's sessions use: the quickest that there is, or the one that was asked for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import grpc
from kt_expert_proto.fast_path import MOST_SPIN_US
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc

from kt_expert_client.address import ServerAddress
from kt_expert_client.credentials import Credentials
from kt_expert_client.errors import InvalidRequest, KtExpertError
from kt_expert_client.wire import data_plane, same_host
from kt_expert_client.wire.base import Receiver, Transport
from kt_expert_client.wire.grpc_stream import GrpcStreamTransport, Metadata
from kt_expert_client.wire.same_host import connect_same_host
from kt_expert_client.wire.socket_transport import Connected, Connector, NotPossibleError, SocketTransport

TRANSPORT_VARIABLE = "KT_EXPERT_TRANSPORT"
DIRECTORY_VARIABLE = "KT_EXPERT_SAME_HOST_DIR"  # where this process sees the directory of the server's socket, if elsewhere
AUTO, STREAM, SAME_HOST, TCP = "auto", "stream", "same-host", "tcp"
SPIN_VARIABLE = "KT_EXPERT_SPIN"  # microseconds that a small forward looks for its answer before its thread sleeps
_KNOWN = (AUTO, SAME_HOST, TCP, STREAM)
_ORDER = (SAME_HOST, TCP, STREAM)  # in which `auto` tries them
_WHAT = {SAME_HOST: same_host.WHAT, TCP: data_plane.WHAT}  # completes "a connection"
_ASK_TIMEOUT_S = 20.0
_MOST_FAILURES = 3
_US_PER_S = 1_000_000
_log = logging.getLogger(__name__)


class Transports:
    """Implements Opener. With `auto`, one that is refused is logged, and the next is used from then on."""

    def __init__(
        self, channel: grpc.Channel, metadata: Metadata, wanted: str | None, address: ServerAddress, credentials: Credentials
    ) -> None:  # fmt: skip
        """`wanted` defaults to the environment's, and that to auto. Raises InvalidRequest for one there is not, and for a
        variable that makes no sense."""
        self._wanted = wanted or os.environ.get(TRANSPORT_VARIABLE, AUTO)
        if self._wanted not in _KNOWN:
            given = f"transport is {wanted!r}" if wanted else f"{TRANSPORT_VARIABLE} is {self._wanted!r}"
            raise InvalidRequest(f"{given}, expected one of {', '.join(_KNOWN)}")
        self._channel, self._metadata, self._address = channel, metadata, address
        self._stub = service_pb2_grpc.ExpertStub(channel)
        self._data_plane = data_plane.DataPlane(address, data_plane.tls_context(address, credentials))
        self._spin_s = _spin_s()
        self._failures = 0  # handshakes in a row that did not come to their end
        self.name = _ORDER[0] if self._wanted == AUTO else self._wanted

    def __call__(self, receiver: Receiver) -> Transport:
        if self.name == STREAM:
            return GrpcStreamTransport(self._channel, self._metadata, receiver)
        name = self.name
        connect = self._connect_same_host if name == SAME_HOST else self._connect_data_plane
        connector = Connector(
            _WHAT[name], connect, lambda reason: self._refused(name, reason), lambda succeeded: self._connected(name, succeeded)
        )
        return SocketTransport(connector, receiver)

    def _connect_same_host(self) -> Connected:
        offer: pb.SameHostOffer = self._ask(self._stub.OfferSameHost, pb.SameHostRequest())
        if offer.socket_path and DIRECTORY_VARIABLE in os.environ:
            offer.socket_path = os.path.join(os.environ[DIRECTORY_VARIABLE], os.path.basename(offer.socket_path))
        return connect_same_host(offer, self._spin_s)

    def _connect_data_plane(self) -> Connected:
        proxy = self._address.proxy_variable
        if proxy is not None:
            raise NotPossibleError(f"connections to {self._address.text} go through the proxy that {proxy} names")
        return self._data_plane.connect(self._ask(self._stub.OfferDataPlane, pb.DataPlaneRequest()))

    def _ask(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return method(request, timeout=_ASK_TIMEOUT_S, metadata=self._metadata)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise NotPossibleError("the server is of a version that has none") from error
            raise

    def _connected(self, name: str, succeeded: bool) -> None:
        self._failures = 0 if succeeded else self._failures + 1
        if self._failures >= _MOST_FAILURES:  # a server that was killed meanwhile is rarely met twice
            self._refused(name, f"{self._failures} connections in a row ended in the middle of the handshake")

    def _refused(self, name: str, reason: str) -> KtExpertError | None:
        """Of one transport, by a session that wanted to use it."""
        if self._wanted == name:
            return InvalidRequest(
                f"transport is {name!r}, and there is no connection {_WHAT[name]}: {reason}; use {AUTO!r} or {STREAM!r}",
                is_answer=True,
            )
        if self.name == name:
            self.name = _ORDER[_ORDER.index(name) + 1]
            self._failures = 0
            _log.info("there is no connection %s, so %s is tried: %s", _WHAT[name], self.name, reason)
        return None


def _spin_s() -> float:
    """What the environment says. Raises InvalidRequest."""
    given = os.environ.get(SPIN_VARIABLE, "0")
    if not given.isdecimal() or int(given) > MOST_SPIN_US:
        raise InvalidRequest(f"{SPIN_VARIABLE} is {given!r}, expected microseconds from 0 to {MOST_SPIN_US}")
    return int(given) / _US_PER_S
