"""Expert matrices that a checkpoint holds as codes and scales: kept as they are, or decoded for another format.

fp8 (DeepSeek-V3 and others): `weight` F8_E4M3 [N, K] and `weight_scale_inv`, one scale per 128 x 128, of any float type.
mxfp4 (gpt-oss): `*_blocks` U8 [E, N, K / 32, 16], two E2M1 codes a byte, the lower nibble first, and `*_scales` U8
[E, N, K / 32], exponents of E8M0 (OCP Microscaling Formats 1.0).
"""

from __future__ import annotations

from dataclasses import dataclass

import kt_expert_native as native
import numpy as np
from numpy.typing import NDArray

from kt_expert_server.errors import ModelError
from kt_expert_server.model.bf16 import bf16_to_fp32, round_to_bf16

FP8_BLOCK = 128
MXFP4_GROUP = 32
_E8M0_NAN = 255
_LARGEST_SURE_SCALE = 252  # 2^125: times the largest code, 6, it is still finite
_E8M0_VALUES: NDArray[np.float32] = np.append(2.0 ** (np.arange(_E8M0_NAN) - 127.0), np.nan).astype(np.float32)
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_MXFP4_VALUES: NDArray[np.float32] = np.concatenate([_E2M1, -_E2M1])


def _e4m3_values() -> NDArray[np.float32]:
    """All 256 codes of OCP E4M3: bias 7, no infinities, NaN at S.1111.111."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 0xF, codes & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


_FP8_VALUES = _e4m3_values()


@dataclass(frozen=True, slots=True)
class CodedMatrix:
    """One projection of one expert: codes uint8 [rows, bytes], scales [groups of rows, groups of depths]."""

    form: str  # "fp8" or "mxfp4"
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32] | NDArray[np.uint8]

    def store(self, weights: native.LayerWeights, projection: str, expert: int, source: str) -> None:
        """Hands the codes over as they are where the layer is held in this form, else decoded. Raises ModelError, whatever the
        form, for values that are not finite."""
        try:
            if weights.weight_format == self.form:
                if self._may_overflow():
                    _require_finite(self.decode(), source, expert)
                scales = np.ascontiguousarray(self.scales).view(np.uint8)
                weights.set_native(projection, expert, np.ascontiguousarray(self.codes).reshape(-1), scales.reshape(-1))
            else:
                bits = round_to_bf16(self.decode())
                _require_finite(bf16_to_fp32(bits), source, expert)
                weights.set_matrix(projection, expert, bits.reshape(-1))
        except native.InvalidArgument as error:
            raise ModelError(f"{source}, expert {expert}: {error}") from error

    def _may_overflow(self) -> bool:
        """Whether it takes a look at every value; the engine looks at the scales itself, which is enough for fp8."""
        return self.form == "mxfp4" and self.scales.max(initial=0) > _LARGEST_SURE_SCALE

    def decode(self) -> NDArray[np.float32]:
        """The values, [rows, columns]."""
        if self.form == "fp8":
            values = _FP8_VALUES[self.codes]
            return _product(values, spread(self.scales.astype(np.float32), *values.shape))
        nibbles = np.stack([self.codes & 0xF, self.codes >> 4], axis=-1).reshape(len(self.codes), -1)
        factors = _E8M0_VALUES[self.scales.astype(np.uint8)]
        return _product(_MXFP4_VALUES[nibbles], np.repeat(factors, MXFP4_GROUP, axis=1))


def scale_shape(form: str, rows: int, columns: int) -> tuple[int, int]:
    """Of the scales of a [rows, columns] matrix."""
    if form == "fp8":
        return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    return rows, columns // MXFP4_GROUP


def spread(scales: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """fp8's scales, one for each of the values of a [rows, columns] matrix."""
    return np.repeat(np.repeat(scales, FP8_BLOCK, axis=0)[:rows], FP8_BLOCK, axis=1)[:, :columns]


def _require_finite(values: NDArray[np.float32], source: str, expert: int) -> None:
    if not np.isfinite(values).all():
        raise ModelError(f"{source}, expert {expert}: codes and scales give values that are not finite")


def _product(values: NDArray[np.float32], factors: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
        return values * factors
