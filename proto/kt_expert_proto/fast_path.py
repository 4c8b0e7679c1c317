"""Small forwards that keep nothing, on a socket of their own between a trainer and a server on one host.

The server hands over its end with the shared memory (kt_expert_proto/same_host.py). A request names an entry, which the result
of an ordinary forward has told (ResultHead.fast_entry): what the like of that forward computes with, for as long as nothing
changes it. Then come expert ids, int32 [T, k], routing weights, fp32 [T, k], and hidden states [T, H]; an answer that is
DONE brings the output [T, H]. Any other answer, and none, means that the forward is to be asked for the ordinary way: nothing
was changed. One request is under way at a time. native/include/kt_expert/fast_path.h is the other end.
"""

from __future__ import annotations

import struct

_REQUEST = struct.Struct("<IIQII8x")  # magic, tokens, entry, sequence, bytes that follow
_ANSWER = struct.Struct("<IIII")  # magic, sequence, status, bytes that follow
_REQUEST_MAGIC, _ANSWER_MAGIC = int.from_bytes(b"KTFQ", "little"), int.from_bytes(b"KTFA", "little")
ANSWER_BYTES = _ANSWER.size
DONE, BUSY, UNKNOWN, REFUSED = range(4)  # BUSY: the engine has other work, which has an order
MOST_SPIN_US = 50  # that an end looks for the other's word before it sleeps: what a core does meanwhile is nobody's
MOST_TOKENS = 64
MOST_BYTES = 1 << 20  # of a request's tensors


def request(entry: int, tokens: int, sequence: int, size_bytes: int) -> bytes:
    return _REQUEST.pack(_REQUEST_MAGIC, tokens, entry, sequence, size_bytes)


def answer(packed: bytes | memoryview) -> tuple[int, int, int]:
    """Sequence, status and the bytes that follow. Raises ValueError for what is no answer."""
    magic, sequence, status, size = _ANSWER.unpack(packed)
    if magic != _ANSWER_MAGIC or size > MOST_BYTES:
        raise ValueError(f"an answer begins with {magic:#x} and brings {size} bytes, expected {_ANSWER_MAGIC:#x}")
    return sequence, status, size
