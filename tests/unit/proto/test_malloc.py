"""What the C library says of its heaps."""

from __future__ import annotations

import numpy as np
from kt_expert_proto.malloc import bytes_in_use

KEPT_BYTES = 8 << 20


def test_memory_that_is_taken_and_given_back_is_counted() -> None:
    before = bytes_in_use()
    assert before is not None  # glibc, which tests run on
    kept = np.empty(KEPT_BYTES, np.uint8)
    during = bytes_in_use()
    del kept
    after = bytes_in_use()
    assert during is not None
    assert after is not None
    assert during - before >= KEPT_BYTES
    assert during - after >= KEPT_BYTES
