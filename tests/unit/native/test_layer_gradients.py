"""Output and every gradient of a layer against float64 autograd, within the numerics contract."""

from __future__ import annotations

import dataclasses

import kt_expert_native as native
import pytest
import torch
from golden import native as on_engine
from golden.philox import philox
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
    "rank-1": (Shape(3, 33, 21, 17, 2), Lora(False, 1, 1, 1, 2.0, 2.0, 2.0), None),
    "rank-256": (Shape(3, 70, 50, 40, 2), Lora(True, 256, 256, 256, 0.06, 0.06, 0.06), None),
    "dropout-split": (Shape(5, 37, 29, 23, 3), dataclasses.replace(SPLIT, dropout=0.3), None),
    "dropout-tied": (Shape(4, 200, 136, 50, 2), dataclasses.replace(TIED, dropout=0.1), None),
    "dropout-down": (Shape(4, 48, 40, 21, 2), dataclasses.replace(DOWN_ONLY, dropout=0.5), None),
}
DROPPING = [name for name in CASES if name.startswith("dropout")]
DROPOUT_SEED = (1 << 62) + 12345


@pytest.fixture(params=[name for name, obstacle in native.list_isas() if not obstacle])
def engine(request: pytest.FixtureRequest) -> native.Engine:
    return native.Engine(2, request.param)


def case_named(name: str) -> Case:
    shape, lora, used = CASES[name]
    case = make_case(shape, lora, seed=len(name), used_experts=used)
    return dataclasses.replace(case, dropout_seed=DROPOUT_SEED, dropout_layer=7) if lora.dropout else case


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


@pytest.mark.parametrize("save", ["activations", "inputs"])
@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole(engine: native.Engine, name: str, save: str) -> None:
    """To the bit, but for gradients of LoRA, which are added part by part."""
    case = case_named(name)
    whole, parts = (on_engine.run(engine, case, "fp32", save=save, tile_tokens=tile) for tile in (None, 7))
    for each in ("y", "dx", "d_weights"):
        assert torch.equal(getattr(whole, each), getattr(parts, each)), each
    errors = {key: relative_error(parts.adapter[key], value) for key, value in whole.adapter.items()}
    assert all(error <= FP32_BOUND for error in errors.values()), errors


def test_a_wrong_id_in_a_part_is_named_by_its_place_in_the_batch(engine: native.Engine) -> None:
    case = case_named("ragged")
    case.ids[15, 1] = case.shape.experts + 1
    with pytest.raises(native.InvalidArgument, match=f"expert id {case.shape.experts + 1} at token 15, slot 1 is outside"):
        on_engine.run(engine, case, tile_tokens=7)


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


@pytest.mark.parametrize("name", DROPPING)
def test_a_recompute_replays_dropout(engine: native.Engine, name: str) -> None:
    kept, again = (on_engine.run(engine, case_named(name), "bf16", save=save) for save in ("activations", "inputs"))
    assert torch.equal(kept.dx, again.dx)
    assert torch.equal(kept.d_weights, again.d_weights)
    assert all(torch.equal(value, again.adapter[key]) for key, value in kept.adapter.items())


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_depends_on_seed_and_layer_and_is_off_without_a_seed(engine: native.Engine, name: str) -> None:
    case = case_named(name)
    without = dataclasses.replace(case, lora=dataclasses.replace(case.lora, dropout=0.0))
    off = on_engine.run(engine, dataclasses.replace(case, dropout_seed=0), "fp32")
    assert torch.equal(off.y, on_engine.run(engine, without, "fp32").y)
    y = on_engine.run(engine, case, "fp32").y
    for other in ({"dropout_seed": DROPOUT_SEED + 1}, {"dropout_layer": 8}, {"dropout_seed": 0}):
        assert not torch.equal(on_engine.run(engine, dataclasses.replace(case, **other), "fp32").y, y)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(dropout: float) -> None:
    with pytest.raises(native.InvalidArgument, match=r"expected a probability in \[0, 1\)"):
        native.AdapterSpec(rank_up=1, dropout=dropout)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    """The reference's generator, which the engine's masks are held against above; figures from Random123's kat_vectors."""
    assert philox(counter, key) == expected
