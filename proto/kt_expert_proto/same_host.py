"""How a trainer and a server on one host meet, and the memory that both see.

The handshake on a unix socket is that of kt_expert_proto/handshake.py. With its proof the server sends two descriptors: the
memory, and an end of a socket for small forwards (kt_expert_proto/fast_path.py). The client's proof is about the NONCE_BYTES
at the front of the memory, so the client shows that it sees the very memory that the server does.

The memory is a file without a name, of a size that nobody can change (F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_SEAL): a control
page, then the region that the client writes, then the one that the server writes, both equally large.
"""

from __future__ import annotations

import fcntl
import os

MAGIC = b"KTSH"
CONTROL_BYTES = 4096  # in front of the regions
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
MAX_PATH_BYTES = 107  # of a unix socket's address


def region_bytes(descriptor: int) -> int:
    """Of each of the two regions. Raises ValueError for memory that is not sealed, or of a size that cannot be."""
    seals, size = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS), os.fstat(descriptor).st_size
    if seals & SEALS != SEALS:
        raise ValueError(f"the memory has seals {seals:#x}, expected at least {SEALS:#x}: its size could change")
    region = (size - CONTROL_BYTES) // 2
    if region < CONTROL_BYTES or size != CONTROL_BYTES + 2 * region:
        raise ValueError(f"the memory has {size} bytes, expected {CONTROL_BYTES} and two equal regions")
    return region
