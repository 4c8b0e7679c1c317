"""Codes that a merged checkpoint is written with, against torch's own cast and against every code there is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kt_expert_server.model.encoding import encode_fp8, encode_mxfp4, fp8_scales


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 300), (5, 257)])
def test_fp8_codes_are_torchs(shape: tuple[int, int]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 0, shape[1])
    coded = encode_fp8(values.numpy(), fp8_scales(values.numpy()))
    assert coded.scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    wide = np.repeat(np.repeat(coded.scales, 128, 0)[: shape[0]], 128, 1)[:, : shape[1]]
    expected = (values / torch.from_numpy(wide)).to(torch.float8_e4m3fn)
    assert np.array_equal(coded.codes, expected.view(torch.uint8).numpy())
    for row in range(coded.scales.shape[0]):
        assert np.abs(coded.codes[row * 128 : (row + 1) * 128] & 0x7F).max() == 0x7E  # 448 is used


def test_every_fp8_code_comes_back() -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()[None]
    assert np.array_equal(encode_fp8(values, np.ones((1, 2), np.float32)).codes, codes[None])


def test_fp8_ties_go_to_the_even_code() -> None:
    halves = (np.arange(0, 0x7E)[:, None] + [0, 1]).astype(np.uint8)
    pairs = torch.from_numpy(halves).view(torch.float8_e4m3fn).float().numpy()
    got = encode_fp8(pairs.mean(axis=1)[None], np.ones((1, 1), np.float32)).codes[0]
    assert np.array_equal(got, np.where(halves[:, 0] % 2 == 0, halves[:, 0], halves[:, 1]))


def test_fp8_of_given_scales_does_not_overflow() -> None:
    assert encode_fp8(np.array([[1000.0, -1000.0]], np.float32), np.ones((1, 1), np.float32)).codes.tolist() == [[0x7E, 0xFE]]


def test_zeros() -> None:
    zeros = np.zeros((2, 64), np.float32)
    for coded in (encode_fp8(zeros, fp8_scales(zeros)), encode_mxfp4(zeros)):
        assert not coded.decode().any()


def test_mxfp4_takes_the_nearest_of_all_codes() -> None:
    values = (
        np.random.default_rng(2).standard_normal((50, 96)).astype(np.float32)
        * np.logspace(-3, 3, 50, dtype=np.float32)[:, None]
    )
    coded = encode_mxfp4(values)
    numbers = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    exponents = np.repeat(coded.scales.astype(np.float64) - 127, 32, axis=1)
    apart = np.abs(np.abs(values / 2**exponents)[..., None] - numbers).min(axis=-1)
    got = np.abs(values - coded.decode()) / 2**exponents
    assert np.allclose(got, apart, atol=1e-6)
    assert np.abs(values / 2**exponents).max() < 8  # the largest power of two among the codes is 4


def test_mxfp4_codes_come_back() -> None:
    codes = np.random.default_rng(3).integers(0, 16, (4, 64))
    codes[:, ::32] = 7  # each group has the largest
    numbers = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
    values = np.where(codes & 8, -numbers[codes & 7], numbers[codes & 7]) * np.float32(2.0**-9)
    coded = encode_mxfp4(values)
    assert (coded.scales == 127 - 9).all()
    assert np.array_equal(coded.codes, codes[:, 0::2] | codes[:, 1::2] << 4)


@pytest.mark.parametrize(
    ("value", "expected"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]
)
def test_mxfp4_ties_go_to_the_even_code(value: float, expected: float) -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :2] = 6.0, value
    assert encode_mxfp4(values).decode()[0, 1] == expected
