"""What the engine promises beyond one gradient: the same bits, exact optimizer steps, whole backwards, known sizes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import kt_expert_native as native
import numpy as np
import pytest
import torch
from golden import native as on_engine
from golden.reference import Case, Lora, Shape, golden, make_case, relative_error
from kt_expert_proto.lora import TENSORS

LORA = Lora(True, 4, 4, 6, 2.0, 2.0, 1.0)
SHAPE = Shape(6, 70, 44, 61, 3)
ISAS = [name for name, obstacle in native.list_isas() if not obstacle]


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left, right)


def rows(case: Case, selected: slice) -> Case:
    """The same weights and adapter with some of the tokens."""
    shape = Shape(**{**{f: getattr(case.shape, f) for f in Shape.__dataclass_fields__}, "tokens": len(case.x[selected])})
    return Case(
        shape,
        case.lora,
        case.weights,
        case.biases,
        case.adapter,
        case.x[selected],
        case.ids[selected],
        case.routing_weights[selected],
        case.dy[selected],
    )


@pytest.mark.parametrize("isa", ISAS)
def test_thread_count_does_not_change_a_bit(isa: str) -> None:
    case = make_case(SHAPE, LORA, seed=3)
    one, five = on_engine.run(native.Engine(1, isa), case, "fp32"), on_engine.run(native.Engine(5, isa), case, "fp32")
    assert same_bits(one.y, five.y)
    assert same_bits(one.dx, five.dx)
    assert same_bits(one.d_weights, five.d_weights)
    assert all(same_bits(one.adapter[name], five.adapter[name]) for name in one.adapter)


@pytest.mark.parametrize("isa", ISAS)
def test_batch_composition_does_not_change_a_bit(isa: str) -> None:
    case = make_case(SHAPE, LORA, seed=4)
    engine = native.Engine(2, isa)
    together = on_engine.run(engine, case, "fp32")
    for selected in (slice(0, 1), slice(7, 20), slice(20, 61)):
        alone = on_engine.run(engine, rows(case, selected), "fp32")
        assert same_bits(together.y[selected], alone.y)
        assert same_bits(together.dx[selected], alone.dx)
        assert same_bits(together.d_weights[selected], alone.d_weights)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("save", ["activations", "inputs"])
def test_what_an_earlier_ticket_left_does_not_change_a_bit(save: str, dtype: str) -> None:
    """Tickets above 1 MiB take over the memory of those before them; here it is full of NaN."""
    case = make_case(Shape(4, 70, 44, 8000, 2), LORA, seed=8)
    poison = dataclasses.replace(case, x=torch.full_like(case.x, float("nan")))
    fresh, used = native.Engine(2), native.Engine(2)
    on_engine.run(used, poison, dtype, save=save)
    assert used.kept_bytes > 2**20
    expected, got = on_engine.run(fresh, case, dtype, save=save), on_engine.run(used, case, dtype, save=save)
    assert used.kept_bytes == fresh.kept_bytes
    assert same_bits(expected.y, got.y)
    assert same_bits(expected.dx, got.dx)
    assert same_bits(expected.d_weights, got.d_weights)
    assert all(same_bits(expected.adapter[name], got.adapter[name]) for name in expected.adapter)
    used.drop_kept()
    assert used.kept_bytes == 0


def test_tickets_serve_in_any_order() -> None:
    case = make_case(SHAPE, LORA, seed=5)
    engine, weights, adapter = native.Engine(2), on_engine.load_weights(case), on_engine.load_adapter(case)
    parts = [rows(case, slice(0, 20)), rows(case, slice(20, 33)), rows(case, slice(33, 61))]
    tickets = []
    for part in parts:
        y = on_engine.empty_tokens(part, "fp32")
        ids, route_weights = part.ids.to(torch.int32).numpy(), part.routing_weights.float().numpy()
        tickets.append(engine.forward(weights, adapter, on_engine.tokens(part.x, "fp32"), ids, route_weights, y, "activations"))
    for position in (1, 2, 0):
        part, ticket = parts[position], tickets[position]
        assert ticket is not None
        gradients = native.AdapterTensors(on_engine.layer_spec(part), on_engine.lora_spec(part))
        dx = on_engine.empty_tokens(part, "fp32")
        d_weights = np.empty((part.shape.tokens, part.shape.top_k), np.float32)
        engine.backward(weights, adapter, gradients, ticket, on_engine.tokens(part.dy, "fp32"), dx, d_weights)
        assert relative_error(on_engine.as_float64(dx), golden(part).dx) < 5e-6


def test_identical_micro_batches_do_not_drift() -> None:
    case = make_case(Shape(4, 32, 24, 16, 2), LORA, seed=6)
    engine, weights, adapter = native.Engine(2), on_engine.load_weights(case), on_engine.load_adapter(case)
    gradients = native.AdapterTensors(on_engine.layer_spec(case), on_engine.lora_spec(case))
    ids, route_weights = case.ids.to(torch.int32).numpy(), case.routing_weights.float().numpy()
    y, dx = on_engine.empty_tokens(case, "bf16"), on_engine.empty_tokens(case, "bf16")
    d_weights = np.empty((16, 2), np.float32)
    micro_batches = 256
    x, dy = on_engine.tokens(case.x, "bf16"), on_engine.tokens(case.dy, "bf16")
    ticket = engine.forward(weights, adapter, x, ids, route_weights, y, "activations")
    assert ticket is not None
    engine.backward(weights, adapter, gradients, ticket, dy, dx, d_weights)
    once = {name: gradients.tensor(name).copy() for name in gradients.names()}
    for _ in range(micro_batches - 1):
        engine.backward(weights, adapter, gradients, ticket, dy, dx, d_weights)
    for name, first in once.items():
        expected = torch.from_numpy(first).double() * micro_batches
        assert relative_error(torch.from_numpy(gradients.tensor(name)), expected) < 1e-3


@pytest.mark.parametrize("order", [2.0, 1.0, 3.0, 0.5, 0.0, math.inf, -math.inf])
def test_gradient_norms_are_of_the_average(order: float) -> None:
    """The last expert's matrices are larger than one worker's piece."""
    layer, lora = native.LayerSpec(2, 2100, 7), native.AdapterSpec(rank_gate=5, scale_gate=1.0)
    ranks = [native.AdapterTensors(layer, lora) for _ in range(3)]
    generator = np.random.default_rng(0)
    expected = {}
    for name in ranks[0].names():
        values = generator.standard_normal((3, *ranks[0].tensor(name).shape)).astype(np.float32)
        values[:, 0, 0] = 0.0 if order == 0.0 else values[:, 0, 0]
        for rank, tensors in enumerate(ranks):
            tensors.tensor(name)[...] = values[rank]
        norm = torch.linalg.vector_norm(torch.from_numpy(values).double().mean(0), order).item()
        expected[name] = norm if order == 0.0 or math.isinf(order) else norm**order
    # Three fp32 values are added up first; the smallest sum may be next to nothing.
    assert native.Engine(2).gradient_norms(order, 1 / 3, ranks) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf, -math.inf])
def test_a_gradient_that_is_not_a_number_makes_the_norm_none(order: float) -> None:
    layer, lora = native.LayerSpec(2, 9, 7), native.AdapterSpec(rank_gate=3, scale_gate=1.0)
    gradients = native.AdapterTensors(layer, lora)
    gradients.tensor("a_gate")[1, 2, 3] = np.nan
    norms = native.Engine(2).gradient_norms(order, 1.0, [gradients])
    assert math.isnan(norms["a_gate"])
    assert norms["b_gate"] == 0.0


def test_a_cancelled_backward_leaves_the_gradients_alone() -> None:
    case = make_case(SHAPE, LORA, seed=7)
    engine, weights, adapter = native.Engine(2), on_engine.load_weights(case), on_engine.load_adapter(case)
    gradients = native.AdapterTensors(on_engine.layer_spec(case), on_engine.lora_spec(case))
    y, dx = on_engine.empty_tokens(case, "fp32"), on_engine.empty_tokens(case, "fp32")
    ids, route_weights = case.ids.to(torch.int32).numpy(), case.routing_weights.float().numpy()
    ticket = engine.forward(weights, adapter, on_engine.tokens(case.x, "fp32"), ids, route_weights, y, "activations")
    assert ticket is not None
    d_weights = np.empty(ids.shape, np.float32)
    dy = on_engine.tokens(case.dy, "fp32")
    token = native.CancelToken()
    token.cancel()
    with pytest.raises(native.Cancelled):
        engine.backward(weights, adapter, gradients, ticket, dy, dx, d_weights, token=token)
    with pytest.raises(native.DeadlineExceeded):
        engine.backward(weights, adapter, gradients, ticket, dy, dx, d_weights, token=native.CancelToken(0.0))
    assert not any(gradients.tensor(name).any() for name in gradients.names())
    engine.backward(weights, adapter, gradients, ticket, dy, dx, d_weights)
    expected = golden(case).adapter
    assert relative_error(torch.from_numpy(gradients.tensor("b_up")), expected["b_up"]) < 5e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", ["bf16", "int8", "int4-g32", "nf4"])
def test_nan_stays_in_its_token(isa: str, weight_format: str) -> None:
    case = make_case(SHAPE, LORA, seed=5)
    engine = native.Engine(2, isa)
    good = on_engine.run(engine, case, "fp32", weight_format)
    case.x[7, 3], case.routing_weights[20, 1] = math.nan, math.nan
    spoilt = on_engine.run(engine, case, "fp32", weight_format)
    others = [token for token in range(SHAPE.tokens) if token not in (7, 20)]
    for got, expected in ((spoilt.y, good.y), (spoilt.dx, good.dx), (spoilt.d_weights, good.d_weights)):
        assert same_bits(got[others], expected[others])
    assert spoilt.y[[7, 20]].isnan().all()
    assert spoilt.dx[20].isnan().any()


@pytest.mark.parametrize("tokens", [0, 1, 61])
def test_ticket_takes_the_bytes_announced(tokens: int) -> None:
    case = make_case(Shape(6, 70, 44, tokens, 3), LORA)
    y = on_engine.empty_tokens(case, "bf16")
    ids, route_weights = case.ids.to(torch.int32).numpy(), case.routing_weights.float().numpy()
    ticket = native.Engine(1).forward(
        on_engine.load_weights(case), on_engine.load_adapter(case), on_engine.tokens(case.x, "bf16"), ids,
        route_weights, y, "activations",
    )  # fmt: skip
    announced = native.Engine.ticket_bytes(on_engine.layer_spec(case), on_engine.lora_spec(case), tokens, 3, "bf16")
    assert ticket is not None
    assert ticket.nbytes == announced


BAD_CALLS = {
    "hidden": (lambda a: a | {"x": np.zeros((4, 9), np.float32)}, r"x has shape \(4, 9\), expected \(4, 8\)"),
    "dtype": (lambda a: a | {"x": np.zeros((4, 8), np.float64)}, "dtype float64, expected uint16"),
    "order": (lambda a: a | {"x": np.zeros((8, 4), np.float32).T}, "C-contiguous"),
    "id": (lambda a: a | {"expert_ids": np.full((4, 2), 7, np.int32)}, r"expert id 7 at token 0, slot 0 is outside \[0, 3\)"),
    "negative": (lambda a: a | {"expert_ids": np.full((4, 2), -1, np.int32)}, "expert id -1"),
    "k": (lambda a: a | {"routing_weights": np.zeros((4, 3), np.float32)}, "expected one"),
}


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_arguments_are_named(what: str) -> None:
    change, message = BAD_CALLS[what]
    good = {
        "x": np.zeros((4, 8), np.float32),
        "expert_ids": np.zeros((4, 2), np.int32),
        "routing_weights": np.zeros((4, 2), np.float32),
        "y": np.zeros((4, 8), np.float32),
    }
    weights = native.LayerWeights(native.LayerSpec(3, 8, 5))
    with pytest.raises(native.InvalidArgument, match=message):
        native.Engine(1).forward(weights, None, save="nothing", **change(good))


def test_an_unknown_or_missing_instruction_set_is_an_error() -> None:
    with pytest.raises(native.InvalidArgument, match="choose one of"):
        native.Engine(1, "avx9000")
    with pytest.raises(native.InvalidArgument, match="thread count 0"):
        native.Engine(0)


def _ready_for_backward() -> tuple[Callable[..., None], native.AdapterTensors, native.AdapterTensors, np.ndarray]:
    """A backward whose batch leaves experts out, gradients to add to, others that hold 7, and where dx will be."""
    case = make_case(Shape(6, 40, 24, 9, 2), LORA, seed=9, used_experts=3)
    engine, weights, adapter = native.Engine(2), on_engine.load_weights(case), on_engine.load_adapter(case)
    fresh, used = (native.AdapterTensors(on_engine.layer_spec(case), on_engine.lora_spec(case)) for _ in range(2))
    for name in used.names():
        used.tensor(name)[...] = 7.0
    x, dy = on_engine.tokens(case.x, "fp32"), on_engine.tokens(case.dy, "fp32")
    ids, route_weights = case.ids.to(torch.int32).numpy(), case.routing_weights.float().numpy()
    y, dx, d_weights = np.empty_like(x), np.empty_like(x), np.empty(ids.shape, np.float32)
    ticket = engine.forward(weights, adapter, x, ids, route_weights, y, "activations")
    assert ticket is not None

    def backward(gradients: native.AdapterTensors | None, **how: Any) -> None:
        engine.backward(weights, adapter, gradients, ticket, dy, dx, d_weights, **how)

    return backward, fresh, used, dx


def test_replaced_gradients_are_those_of_one_backward() -> None:
    """Experts without a row in the batch are cleared too, and a cancelled backward clears nothing."""
    backward, fresh, used, _ = _ready_for_backward()
    token = native.CancelToken()
    token.cancel()
    with pytest.raises(native.Cancelled):
        backward(used, token=token, replaced=list(TENSORS))
    assert all((used.tensor(name) == 7.0).all() for name in used.names())
    backward(fresh)
    backward(used, replaced=list(TENSORS))
    assert all(np.array_equal(used.tensor(name), fresh.tensor(name)) for name in fresh.names())


def test_only_gradients_that_are_wanted_are_touched() -> None:
    """And of these, only those that are to be replaced forget what they held."""
    backward, fresh, used, dx = _ready_for_backward()
    backward(fresh)
    whole = dx.copy()
    backward(used, wanted=["a_gate", "b_down"], replaced=["b_down", "b_gate"])
    assert np.array_equal(dx, whole)
    assert np.array_equal(used.tensor("b_down"), fresh.tensor("b_down"))
    np.testing.assert_allclose(used.tensor("a_gate"), fresh.tensor("a_gate") + 7.0, rtol=1e-5)
    assert all((used.tensor(name) == 7.0).all() for name in used.names() if name not in ("a_gate", "b_down"))
    backward(None, wanted=[])
    assert np.array_equal(dx, whole)


def _scaled(lora: Lora, scales: tuple[float, float, float]) -> Lora:
    return dataclasses.replace(lora, scale_gate=scales[0], scale_up=scales[1], scale_down=scales[2])


@pytest.mark.parametrize("save", ["activations", "inputs"])
def test_a_request_may_have_scales_of_its_own(save: str) -> None:
    case = make_case(SHAPE, LORA, seed=5)
    engine, weights = native.Engine(2), on_engine.load_weights(case)
    adapter, spec = on_engine.load_adapter(case), on_engine.layer_spec(case)
    scales = (0.25, 0.25 if LORA.tied else 3.0, -0.5)
    lora = on_engine.lora_spec(dataclasses.replace(case, lora=_scaled(LORA, scales)))
    other = native.AdapterTensors(spec, lora)
    for name in other.names():
        other.tensor(name)[...] = adapter.tensor(name)
    x, dy = on_engine.tokens(case.x, "fp32"), on_engine.tokens(case.dy, "fp32")
    ids, route_weights = case.ids.to(torch.int32).numpy(), case.routing_weights.float().numpy()
    results = []
    for tensors, own in ((adapter, scales), (other, None)):
        y, dx, d_weights = np.empty_like(x), np.empty_like(x), np.empty(ids.shape, np.float32)
        gradients = native.AdapterTensors(spec, lora)
        ticket = engine.forward(weights, tensors, x, ids, route_weights, y, save, scales=own)
        assert ticket is not None
        engine.backward(weights, tensors, gradients, ticket, dy, dx, d_weights)
        results.append([y, dx, d_weights, *(gradients.tensor(name).copy() for name in gradients.names())])
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan"), float("inf"), 1e30])
def test_a_timeout_without_a_meaning_is_refused(timeout_s: float) -> None:
    with pytest.raises(native.InvalidArgument, match="timeout is"):
        native.CancelToken(timeout_s)
