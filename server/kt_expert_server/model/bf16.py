"""bf16 as the uint16 bits that numpy can hold."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_QUIET_NAN = 0x7FC0


def round_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of `values`, to nearest, ties to even, as torch casts."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), _QUIET_NAN, rounded).astype(np.uint16)


def bf16_to_fp32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)
