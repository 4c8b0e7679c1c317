"""How a trainer and a server on one host meet: who proves what to whom before memory is shared.

The server offers a connection over gRPC (OfferSameHost): the path of a unix socket, and a secret that is good once. There::

    client  MAGIC, the offer's id, 32 random bytes
    server  one byte, ACCEPTED, and HMAC-SHA256(secret, "server" and the client's bytes); with it the memory, as a descriptor
    client  HMAC-SHA256(secret, "client" and NONCE_BYTES that lie at the front of the memory)

So the secret does not go to whoever else has made a socket at that path, and the client shows that it sees the very memory
that the server does. Any other first byte of the server's is a refusal; a sentence follows. Then come messages of frames
(kt_expert_proto/codec.py) in both directions.

The memory is a file without a name, of a size that nobody can change (F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_SEAL): a control
page, then the region that the client writes, then the one that the server writes, both equally large.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os

MAGIC = b"KTSH"
OFFER_ID_BYTES = 16
SECRET_BYTES = 32
CHALLENGE_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = hashlib.sha256().digest_size
GREETING_BYTES = len(MAGIC) + OFFER_ID_BYTES + CHALLENGE_BYTES
ACCEPTED = b"\1"
REFUSED = b"\0"
MAX_REASON_BYTES = 512
CONTROL_BYTES = 4096  # in front of the regions
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
MAX_PATH_BYTES = 107  # of a unix socket's address


def proof(secret: bytes, role: bytes, challenge: bytes) -> bytes:
    return hmac.digest(secret, role + challenge, "sha256")


def is_proof(given: bytes, secret: bytes, role: bytes, challenge: bytes) -> bool:
    return hmac.compare_digest(given, proof(secret, role, challenge))


def region_bytes(descriptor: int) -> int:
    """Of each of the two regions. Raises ValueError for memory that is not sealed, or of a size that cannot be."""
    seals, size = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS), os.fstat(descriptor).st_size
    if seals & SEALS != SEALS:
        raise ValueError(f"the memory has seals {seals:#x}, expected at least {SEALS:#x}: its size could change")
    region = (size - CONTROL_BYTES) // 2
    if region < CONTROL_BYTES or size != CONTROL_BYTES + 2 * region:
        raise ValueError(f"the memory has {size} bytes, expected {CONTROL_BYTES} and two equal regions")
    return region
