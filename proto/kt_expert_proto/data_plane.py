"""Frames over a TCP connection of their own, beside gRPC.

The handshake is that of kt_expert_proto/handshake.py; after its proof the server sends NONCE_BYTES, which the client's proof is
about. Where gRPC is with TLS, this connection is too, TLS 1.3 under the same certificates, and everything travels in it;
frames then carry no checksums, since TLS has better ones.
"""

from __future__ import annotations

import socket
import ssl

from kt_expert_proto.channel import KEEPALIVE_TIME_MS, KEEPALIVE_TIMEOUT_MS

MAGIC = b"KTDP"
LEAST_TLS = ssl.TLSVersion.TLSv1_3  # both ends are kt-expert's own
_PROBES = 4
_MS_PER_S = 1000


def prepare(connection: socket.socket) -> None:
    """What both ends want of TCP: small requests leave at once, and a peer whose host is gone is noticed as over gRPC."""
    options = (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, KEEPALIVE_TIME_MS // _MS_PER_S),
        (socket.TCP_KEEPINTVL, KEEPALIVE_TIMEOUT_MS // _MS_PER_S // _PROBES),
        (socket.TCP_KEEPCNT, _PROBES),
        (socket.TCP_USER_TIMEOUT, KEEPALIVE_TIME_MS + KEEPALIVE_TIMEOUT_MS),
    )
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in options:
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
