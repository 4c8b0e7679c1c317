"""The other way of quantised.py: values to codes and scales, each value to the nearest code, ties to the even one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kt_expert_server.model.quantised import FP8_BLOCK, MXFP4_GROUP, CodedMatrix, spread

_E4M3_LARGEST = 448.0
_HALF = 0.5  # the mantissa of a power of two
_E4M3_LEAST_NORMAL = 2.0**-6
_E4M3_STEP = 2.0**-9  # between the numbers below it
_DROPPED_BITS = 20  # of fp32's 23 of mantissa, 3 stay
_EXPONENT_OF_E4M3 = (127 - 7) << 3  # fp32's bias against its own, in units of its codes
_E8M0_BIAS = 127
_E2M1_LARGEST_EXPONENT = 2  # of 4 and 6
# Halves between neighbours; a value on one goes to the even code, which for every second of them is the upper one.
_E2M1_TIES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
_SIGN_OF_E2M1 = 8

Array = NDArray[np.float32]


def encode_fp8(values: Array, scales: Array) -> CodedMatrix:
    """[rows, columns] with a scale for each block of 128 x 128; what is too large for one becomes the largest code."""
    return CodedMatrix("fp8", _e4m3(values / spread(scales, *values.shape)), scales)


def fp8_scales(values: Array) -> Array:
    """DeepSeek-V3's: a block's largest over 448."""
    return _scales_of(_of_blocks(np.abs(values)))


def rescaled(values: Array, scales: Array, narrow: Callable[[Array], Array]) -> Array:
    """Scales for values that were changed: a block's own where the values still fit, else fp8_scales', or the next power of
    two where all that there are, are such. `narrow` rounds one to what its file holds."""
    largest = _of_blocks(np.abs(values))
    wanted = _scales_of(largest)
    mantissas, exponents = np.frexp(wanted)
    are_powers = (np.frexp(scales)[0] == _HALF).all()
    new = np.ldexp(np.float32(1), exponents - (mantissas == _HALF)) if are_powers else narrow(wanted)
    return np.where(largest <= scales * np.float32(_E4M3_LARGEST), scales, new).astype(np.float32)


def encode_mxfp4(values: Array) -> CodedMatrix:
    """[rows, columns] with an exponent for 32 columns: that of the largest, less 2, as the OCP's formats say."""
    rows, columns = values.shape
    groups = values.reshape(rows, columns // MXFP4_GROUP, MXFP4_GROUP)
    _, above = np.frexp(np.abs(groups).max(axis=2))  # largest = m * 2^above with m in [0.5, 1)
    exponents = np.clip(above - 1 - _E2M1_LARGEST_EXPONENT, -_E8M0_BIAS, _E8M0_BIAS)
    scaled = np.ldexp(groups, -exponents[..., None])
    size, codes = np.abs(scaled), np.zeros(groups.shape, np.uint8)
    for half, goes_up in _E2M1_TIES:
        codes += (size >= half) if goes_up else (size > half)
    codes += np.uint8(_SIGN_OF_E2M1) * np.signbit(scaled)
    pairs = codes.reshape(rows, columns // 2, 2)
    packed = (pairs[..., 0] | pairs[..., 1] << 4).astype(np.uint8)
    return CodedMatrix("mxfp4", packed, (exponents + _E8M0_BIAS).astype(np.uint8))


def _scales_of(largest: Array) -> Array:
    return np.where(largest > 0, largest / np.float32(_E4M3_LARGEST), np.float32(1))


def _of_blocks(values: Array) -> Array:
    """The largest of each block."""
    by_row = np.maximum.reduceat(values, np.arange(0, values.shape[0], FP8_BLOCK), axis=0)
    found: Array = np.maximum.reduceat(by_row, np.arange(0, values.shape[1], FP8_BLOCK), axis=1)
    return found


def _e4m3(values: Array) -> NDArray[np.uint8]:
    """The bits that torch's cast to float8_e4m3fn gives, but for what is too large."""
    size = np.minimum(np.abs(values), np.float32(_E4M3_LARGEST))
    bits = size.view(np.uint32)
    rounded = (bits + ((1 << (_DROPPED_BITS - 1)) - 1) + ((bits >> _DROPPED_BITS) & 1)) >> _DROPPED_BITS
    small = np.rint(size / np.float32(_E4M3_STEP)).astype(np.uint32)  # to even
    codes = np.where(size < _E4M3_LEAST_NORMAL, small, rounded - np.uint32(_EXPONENT_OF_E4M3))
    return (codes | np.where(np.signbit(values), 0x80, 0)).astype(np.uint8)
