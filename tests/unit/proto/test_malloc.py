"""What the C library says of its heaps."""

from __future__ import annotations

import numpy as np
from kt_expert_proto.malloc import bytes_in_use

KEPT_BYTES = 8 << 20
OTHERS_BYTES = 1 << 20  # what else the process may have given back or taken meanwhile


def test_memory_that_is_taken_and_given_back_is_counted() -> None:
    before = bytes_in_use()
    assert before is not None  # glibc, which tests run on
    kept = np.empty(KEPT_BYTES, np.uint8)
    during = bytes_in_use()
    del kept
    after = bytes_in_use()
    assert during is not None
    assert after is not None
    assert during - before >= KEPT_BYTES - OTHERS_BYTES
    assert during - after >= KEPT_BYTES - OTHERS_BYTES
