"""Output and every gradient of a layer against float64 autograd, within the numerics contract."""

from __future__ import annotations

import kt_expert_native as native
import pytest
from golden import native as on_engine
from golden.reference import NO_LORA, Case, Lora, Shape, golden, make_case, relative_error

# Relative L2 of the numerics contract, with tokens in bf16: one rounding costs about 1.7e-3.
BF16_BOUND = 3e-3
# With fp32 tokens and fp32 arithmetic only the order of summation differs from float64.
FP32_BOUND = 5e-6

SPLIT = Lora(False, 4, 3, 5, 2.0, 1.5, 0.5)
TIED = Lora(True, 4, 4, 8, 2.0, 2.0, 1.0)
DOWN_ONLY = Lora(False, 0, 0, 16, 0.0, 0.0, 1.0)
GPT_OSS = {"activation": "gpt_oss", "alpha": 1.702, "limit": 1.0, "bias": True}

CASES = {
    "tile-aligned": (Shape(4, 64, 32, 48, 2), SPLIT, None),
    "ragged": (Shape(5, 37, 29, 23, 3), SPLIT, None),
    "ragged-tied": (Shape(5, 37, 29, 23, 3), TIED, None),
    "empty-experts": (Shape(8, 33, 17, 19, 2), TIED, 3),
    "no-tokens": (Shape(4, 32, 16, 0, 2), SPLIT, None),
    "one-token": (Shape(6, 40, 24, 1, 3), SPLIT, None),
    "one-token-one-route": (Shape(2, 17, 5, 1, 1), TIED, None),
    "deep": (Shape(2, 801, 395, 70, 2), TIED, None),
    "gpt-oss": (Shape(4, 45, 30, 31, 2, **GPT_OSS), TIED, None),
    "bias-silu": (Shape(3, 20, 12, 9, 2, bias=True), SPLIT, None),
    "down-only": (Shape(4, 48, 40, 21, 2), DOWN_ONLY, None),
    "no-adapter": (Shape(4, 48, 40, 21, 2), NO_LORA, None),
}


@pytest.fixture(params=[name for name, obstacle in native.list_isas() if not obstacle])
def engine(request: pytest.FixtureRequest) -> native.Engine:
    return native.Engine(2, request.param)


def case_named(name: str) -> Case:
    shape, lora, used = CASES[name]
    return make_case(shape, lora, seed=len(name), used_experts=used)


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", BF16_BOUND), ("fp32", FP32_BOUND)])
@pytest.mark.parametrize("name", CASES)
def test_matches_autograd(engine: native.Engine, name: str, dtype: str, bound: float) -> None:
    case = case_named(name)
    expected, got = golden(case), on_engine.run(engine, case, dtype)
    errors = {
        "y": relative_error(got.y, expected.y),
        "dx": relative_error(got.dx, expected.dx),
        "d_weights": relative_error(got.d_weights, expected.d_weights),
    }
    assert set(got.adapter) == set(expected.adapter)
    errors |= {key: relative_error(got.adapter[key], value) for key, value in expected.adapter.items()}
    assert all(error <= bound for error in errors.values()), errors


def test_sentinel_routes_are_skipped(engine: native.Engine) -> None:
    case = case_named("ragged")
    case.ids[::2, 0] = case.shape.experts
    expected, got = golden(case), on_engine.run(engine, case, "fp32")
    assert relative_error(got.y, expected.y) <= FP32_BOUND
    assert relative_error(got.dx, expected.dx) <= FP32_BOUND
    assert not got.d_weights[::2, 0].any()


def test_repeated_expert_in_one_token_accumulates(engine: native.Engine) -> None:
    case = case_named("ragged")
    case.ids[:, 1] = case.ids[:, 0]
    expected, got = golden(case), on_engine.run(engine, case, "fp32")
    assert relative_error(got.y, expected.y) <= FP32_BOUND
    assert relative_error(got.adapter["a_down"], expected.adapter["a_down"]) <= FP32_BOUND
