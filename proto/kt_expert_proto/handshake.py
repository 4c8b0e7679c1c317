"""How both ends of a socket beside gRPC show each other who they are: what the same host and the data plane have in common.

The server offers a connection over gRPC: where the socket is, and a secret that is good once. There::

    client  a magic, the offer's id, 32 random bytes
    server  one byte, ACCEPTED, and HMAC-SHA256(secret, "server" and the client's bytes), then what the connection begins with
    client  HMAC-SHA256(secret, "client" and a nonce of the server's)

So the secret does not go to whoever else listens there. Any other first byte of the server's is a refusal; a sentence follows.
Then come messages of frames (kt_expert_proto/codec.py) in both directions.
"""

from __future__ import annotations

import hashlib
import hmac

OFFER_ID_BYTES = 16
SECRET_BYTES = 32
CHALLENGE_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
MAGIC_BYTES = 4
GREETING_BYTES = MAGIC_BYTES + OFFER_ID_BYTES + CHALLENGE_BYTES
ACCEPTED = b"\1"
REFUSED = b"\0"
MAX_REASON_BYTES = 512


def proof(secret: bytes, role: bytes, challenge: bytes) -> bytes:
    return hmac.digest(secret, role + challenge, "sha256")


def is_proof(given: bytes, secret: bytes, role: bytes, challenge: bytes) -> bool:
    return hmac.compare_digest(given, proof(secret, role, challenge))
