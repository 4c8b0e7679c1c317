"""Philox4x32-10 (Salmon et al., SC'11) and the dropout masks made of it, in plain numpy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    k0, k1 = key
    for _ in range(10):
        first, second = _MULTIPLIERS[0] * counter[0], _MULTIPLIERS[1] * counter[2]
        counter = ((second >> 32) ^ counter[1] ^ k0, second & _WORD, (first >> 32) ^ counter[3] ^ k1, first & _WORD)
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return counter


def keep(seed: int, layer: int, token: int, site: int, width: int, probability: float) -> torch.Tensor:
    """Factors [width] of one row: 0 where dropped, 1 / (1 - p) elsewhere. Site 0 is x, expert + 1 is h."""
    key = (seed & _WORD, seed >> 32)
    words: NDArray[np.int64] = np.array(
        [philox((group, token, site, layer), key) for group in range((width + 3) // 4)], dtype=np.int64
    ).reshape(-1)[:width]
    p = float(np.float32(probability))
    return torch.from_numpy(np.where(words < int(p * 2**32), 0.0, 1.0 / (1.0 - p)))
