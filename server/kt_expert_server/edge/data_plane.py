"""The TCP port for frames alone, beside gRPC: what trainers on other hosts come to."""

from __future__ import annotations

import secrets
import socket
import ssl

from kt_expert_proto.data_plane import MAGIC, prepare
from kt_expert_proto.handshake import (
    ACCEPTED,
    CHALLENGE_BYTES,
    GREETING_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    is_proof,
    proof,
)

from kt_expert_server.config import Address, Security
from kt_expert_server.edge.accepting import BACKLOG, Acceptor, Parts
from kt_expert_server.edge.entrance import Caller
from kt_expert_server.edge.listening import check_security, listen
from kt_expert_server.edge.offers import Offer, Offers
from kt_expert_server.edge.socket_stream import SocketStream
from kt_expert_server.edge.sockets import PlainWire, Wire, begin_tls, receive, refuse
from kt_expert_server.edge.tls import TlsFiles
from kt_expert_server.errors import NotAuthenticated, ServerError

OPTION = "--data-listen"
_METHOD = "DataPlane"


class DataPlane:
    """Used from the event loop's thread. `reached_at` is where trainers find it, where that is not where it listens."""

    def __init__(self, address: Address, reached_at: Address | None, security: Security, parts: Parts) -> None:
        """Raises InvalidRequest for an address without protection, or for TLS files that cannot be used."""
        check_security(address, security, OPTION)
        self._parts, self._asked_for, self._reached_at = parts, address, reached_at
        self._files = TlsFiles.of(security)
        self._context = self._files.context() if self._files is not None else None
        self._offers = Offers(MAGIC)
        self._acceptor = Acceptor(_METHOD, parts.metrics, self._serve)
        self.address = address

    def start(self) -> None:
        """Raises ListenError."""
        listening, self.address = listen(self._asked_for, BACKLOG)
        for each in listening:
            self._acceptor.start(each)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more connections, and gives those that are there so long to end. Safe to call twice."""
        await self._acceptor.stop(grace_s)

    @property
    def host(self) -> str:
        """That trainers connect to; empty for the one at which they reach gRPC."""
        return self._reached_at.bare_host if self._reached_at is not None else ""

    @property
    def port(self) -> int:
        return self._reached_at.port if self._reached_at is not None else self.address.port

    def offer(self, caller: Caller) -> Offer:
        return self._offers.make(caller)

    async def _serve(self, connection: socket.socket) -> None:
        prepare(connection)
        context = self._tls()
        if context is None:
            await self._greet(PlainWire(connection, has_checksums=False))
            return
        async with self._acceptor.greeting():
            wire = await begin_tls(connection, context)
        try:
            await self._greet(wire)
        finally:
            wire.close()

    def _tls(self) -> ssl.SSLContext | None:
        """Of the files as they are now."""
        if self._files is not None:
            self._context = self._files.renewed(self._files.context) or self._context
        return self._context

    async def _greet(self, wire: Wire) -> None:
        try:
            async with self._acceptor.greeting():
                offer = await self._shake_hands(wire)
        except ServerError as error:
            refuse(wire, str(error))
            raise
        await SocketStream(self._parts, offer.caller, wire).run()

    async def _shake_hands(self, wire: Wire) -> Offer:
        """Raises NotAuthenticated."""
        greeting = await receive(wire, GREETING_BYTES)
        offer, nonce = self._offers.take(greeting), secrets.token_bytes(NONCE_BYTES)
        # A socket that has sent nothing yet takes so little at once.
        wire.send([ACCEPTED + proof(offer.secret, b"server", greeting[-CHALLENGE_BYTES:]) + nonce])
        if not is_proof(await receive(wire, PROOF_BYTES), offer.secret, b"client", nonce):
            raise NotAuthenticated("the trainer has not shown that the offer is its own")
        return offer
