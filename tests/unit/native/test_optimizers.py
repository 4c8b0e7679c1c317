"""Optimizers against torch.optim's, over steps with gradients of several ranks."""

from __future__ import annotations

from collections.abc import Callable

import kt_expert_native as native
import numpy as np
import pytest
import torch
from golden.reference import relative_error

ISAS = [name for name, obstacle in native.list_isas() if not obstacle]
LAYER, LORA = native.LayerSpec(3, 20, 14), native.AdapterSpec(rank_down=4, scale_down=1.0)
NARROW = native.LayerSpec(3, 19, 14)
TENSORS = ("a_gate", "b_gate", "a_up", "b_up", "a_down", "b_down")
GRAD_SCALE = 0.25

Optimizer = torch.optim.Optimizer
Make = Callable[[list[torch.nn.Parameter]], Optimizer]

CASES: dict[str, tuple[str, dict[str, float], Make]] = {
    "adamw": (
        "adamw",
        {"learning_rate": 3e-3, "beta2": 0.98, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1),
    ),
    "adam with L2": (
        "adam",
        {"learning_rate": 3e-3, "beta2": 0.98, "weight_decay": 0.1},
        lambda p: torch.optim.Adam(p, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1),
    ),
    "sgd": ("sgd", {"learning_rate": 1e-2}, lambda p: torch.optim.SGD(p, lr=1e-2)),
    "sgd with dampened momentum": (
        "sgd",
        {"learning_rate": 1e-2, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.01),
    ),
    "sgd with Nesterov": (
        "sgd",
        {"learning_rate": 1e-2, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    ),
    "adafactor": (
        "adafactor",
        {"learning_rate": 1e-2, "weight_decay": 0.05},
        lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.05),
    ),
}


def make_step(kind: str, numbers: dict[str, float], grad_scale: float = GRAD_SCALE) -> native.LayerStep:
    update = native.OptimizerUpdate(kind, **numbers)  # type: ignore[arg-type]  # nesterov is a bool
    return native.LayerStep(dict.fromkeys(TENSORS, (update, grad_scale)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES)
def test_equals_torch_over_100_steps(isa: str, case: str) -> None:
    kind, numbers, make = CASES[case]
    engine, parameters = native.Engine(2, isa), native.AdapterTensors(LAYER, LORA)
    state = native.OptimizerState(LAYER, LORA, "adamw" if kind == "adam" else kind)
    ranks = [native.AdapterTensors(LAYER, LORA) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    names = parameters.names()
    for name in names:
        parameters.tensor(name)[...] = torch.randn(parameters.tensor(name).shape, generator=generator).numpy()
    # A parameter an expert: Adafactor's norms are of one expert's matrix, the others do not mind.
    theirs = {name: [torch.nn.Parameter(torch.from_numpy(e.copy())) for e in parameters.tensor(name)] for name in names}
    optimizer = make([parameter for each in theirs.values() for parameter in each])
    for _ in range(100):
        for name in names:
            gradients = torch.randn(2, *parameters.tensor(name).shape, generator=generator)
            for rank, tensors in enumerate(ranks):
                tensors.tensor(name)[...] = gradients[rank].numpy()
            for expert, parameter in enumerate(theirs[name]):
                parameter.grad = gradients[:, expert].sum(0) * GRAD_SCALE
        engine.step([(make_step(kind, numbers), ranks, parameters, state, None)])
        optimizer.step()
    for name in names:
        expected = torch.stack([parameter.detach() for parameter in theirs[name]])
        assert relative_error(torch.from_numpy(parameters.tensor(name)), expected) < 1e-6


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
def test_thread_count_does_not_show(kind: str) -> None:
    layer, lora = native.LayerSpec(5, 70, 40), native.AdapterSpec(rank_gate=3, rank_up=5, rank_down=2)
    results = []
    for threads in (1, 3):
        generator = np.random.default_rng(1)
        engine, parameters = native.Engine(threads), native.AdapterTensors(layer, lora)
        state, gradients = native.OptimizerState(layer, lora, kind, "bf16"), native.AdapterTensors(layer, lora)
        for _ in range(2):
            for name in gradients.names():
                values = generator.standard_normal(gradients.tensor(name).shape)
                gradients.tensor(name)[...] = values.astype(np.float32)
            momentum = {"momentum": 0.9} if kind == "sgd" else {}
            engine.step([(make_step(kind, {"learning_rate": 1e-2, **momentum}), [gradients], parameters, state, None)])
        results.append({name: parameters.tensor(name).copy() for name in parameters.names()})
    for name, first in results[0].items():
        assert np.array_equal(first, results[1][name])


@pytest.mark.parametrize("isa", ISAS)
def test_bf16_moments_follow_fp32_ones(isa: str) -> None:
    """A second moment rounded to nearest would stop at a few parts in a thousand of where it should go."""
    layer, lora = native.LayerSpec(4, 64, 32), native.AdapterSpec(rank_down=8, scale_down=1.0)
    engine, gradients = native.Engine(2, isa), native.AdapterTensors(layer, lora)
    states = [native.OptimizerState(layer, lora, "adamw", moments) for moments in ("fp32", "bf16")]
    sets = [native.AdapterTensors(layer, lora) for _ in states]
    counts = 4 * len(gradients.names())
    assert (states[1].nbytes - counts) * 2 == states[0].nbytes - counts
    generator = np.random.default_rng(0)
    for _ in range(300):
        noise = generator.standard_normal(gradients.tensor("a_down").shape)
        gradients.tensor("a_down")[...] = (0.3 + noise).astype(np.float32)
        for state, parameters in zip(states, sets, strict=True):
            engine.step([(make_step("adamw", {"learning_rate": 1e-2}), [gradients], parameters, state, None)])
    ours = (states[1].tensor("exp_avg_sq", "a_down").astype(np.uint32) << 16).view(np.float32)
    assert ours.mean() == pytest.approx(float(states[0].tensor("exp_avg_sq", "a_down").mean()), rel=2e-3)
    error = relative_error(torch.from_numpy(sets[1].tensor("a_down")), torch.from_numpy(sets[0].tensor("a_down")))
    assert error < 2e-2


def test_groups_have_their_own_numbers() -> None:
    engine, parameters, gradients = native.Engine(1), native.AdapterTensors(LAYER, LORA), native.AdapterTensors(LAYER, LORA)
    for name in gradients.names():
        gradients.tensor(name)[...] = 1.0
    slow, fast = (native.OptimizerUpdate("sgd", learning_rate=rate) for rate in (0.5, 8.0))
    step = native.LayerStep({"a_down": (slow, 1.0), "b_down": (fast, 1.0), "b_gate": (slow, 0.5)})
    state = native.OptimizerState(LAYER, LORA, "adamw")
    with pytest.raises(native.InvalidArgument, match="the state is of adamw, the step of sgd"):
        engine.step([(step, [gradients], parameters, state, None)])
    state = native.OptimizerState(LAYER, LORA, "sgd")
    engine.step([(step, [gradients], parameters, state, None)])
    assert (parameters.tensor("a_down") == -0.5).all()
    assert (parameters.tensor("b_down") == -8.0).all()
    assert (parameters.tensor("b_gate") == -0.25).all()


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
def test_a_tensor_without_a_group_stays_as_it_is(kind: str) -> None:
    engine, parameters, gradients = native.Engine(2), native.AdapterTensors(LAYER, LORA), native.AdapterTensors(LAYER, LORA)
    for name in gradients.names():
        gradients.tensor(name)[...] = 1.0
    state = native.OptimizerState(LAYER, LORA, kind)
    update = native.OptimizerUpdate(kind, learning_rate=0.1, weight_decay=0.1, momentum=0.9)
    engine.step([(native.LayerStep({"a_down": (update, 1.0)}), [gradients], parameters, state, None)])
    assert state.tensor("step", "a_down").item() == 1.0
    assert parameters.tensor("a_down").all()
    for name in set(parameters.names()) - {"a_down"}:
        assert not parameters.tensor(name).any()
        assert not any(state.tensor(slot, name).any() for slot in state.slots())


def test_a_gradient_that_is_not_a_number_shows() -> None:
    """As in torch: a limit must not turn NaN into a step of its own."""
    engine, parameters, gradients = native.Engine(1), native.AdapterTensors(LAYER, LORA), native.AdapterTensors(LAYER, LORA)
    gradients.tensor("a_down")[1, 0, 0] = np.nan
    state = native.OptimizerState(LAYER, LORA, "adafactor")
    engine.step([(make_step("adafactor", {"learning_rate": 1.0}), [gradients], parameters, state, None)])
    assert np.isnan(parameters.tensor("a_down")[1]).all()
    assert np.isfinite(parameters.tensor("a_down")[0]).all()


def test_a_momentum_buffer_begins_with_the_first_gradient_it_takes() -> None:
    """torch fills it undampened once there is momentum, and keeps it untouched while there is none."""
    engine, parameters, gradients = native.Engine(1), native.AdapterTensors(LAYER, LORA), native.AdapterTensors(LAYER, LORA)
    gradients.tensor("a_down")[...] = 1.0
    state, theirs = native.OptimizerState(LAYER, LORA, "sgd"), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([theirs], lr=1.0, momentum=0.9, dampening=0.5)
    for momentum in (0.0, 0.9, 0.9, 0.0, 0.8):
        optimizer.param_groups[0]["momentum"] = momentum
        theirs.grad = torch.ones(1)
        optimizer.step()
        numbers = {"learning_rate": 1.0, "momentum": momentum, "dampening": 0.5}
        engine.step([(make_step("sgd", numbers, 1.0), [gradients], parameters, state, None)])
        assert parameters.tensor("a_down") == pytest.approx(theirs.item(), rel=1e-6)
    assert state.tensor("step", "a_down").item() == 3


def test_layers_count_their_own_updates() -> None:
    """A layer that saw no gradient for some steps is corrected for the updates it had, like a torch parameter."""
    engine = native.Engine(1)
    gradients = native.AdapterTensors(LAYER, LORA)
    gradients.tensor("a_down")[...] = 1.0
    layers = [(native.AdapterTensors(LAYER, LORA), native.OptimizerState(LAYER, LORA, "adamw")) for _ in range(2)]
    theirs = [torch.nn.Parameter(torch.zeros(1)) for _ in layers]
    optimizer = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.0)
    for touched in ([0], [0, 1], [1], [0, 1]):
        for index, parameter in enumerate(theirs):
            parameter.grad = torch.ones(1) if index in touched else None
        optimizer.step()
        step = make_step("adamw", {"learning_rate": 0.1}, 1.0)
        engine.step([(step, [gradients], *layers[index], None) for index in touched])
        for (parameters, _), parameter in zip(layers, theirs, strict=True):
            assert parameters.tensor("a_down") == pytest.approx(parameter.item(), rel=1e-6)


@pytest.mark.parametrize("beta1", [0.0, 0.1, 0.5, 0.9])
def test_a_large_average_is_left_at_once_where_beta1_is_small(beta1: float) -> None:
    """old + (1 - beta1) (g - old) loses g beside a far larger old one."""
    engine, parameters, gradients = native.Engine(1), native.AdapterTensors(LAYER, LORA), native.AdapterTensors(LAYER, LORA)
    state, theirs = native.OptimizerState(LAYER, LORA, "adamw"), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([theirs], lr=1.0, betas=(beta1, 0.999), weight_decay=0.0)
    for gradient in (1e8, 1.0, 0.3):
        gradients.tensor("a_down")[...] = gradient
        theirs.grad = torch.tensor([gradient])
        optimizer.step()
        engine.step([(make_step("adamw", {"learning_rate": 1.0, "beta1": beta1}, 1.0), [gradients], parameters, state, None)])
    assert state.tensor("exp_avg", "a_down") == pytest.approx(optimizer.state[theirs]["exp_avg"].item(), rel=1e-6)


def test_a_step_takes_effect_in_all_layers_or_in_none() -> None:
    engine, good = native.Engine(1), native.AdapterTensors(LAYER, LORA)
    gradients, narrow = native.AdapterTensors(LAYER, LORA), native.AdapterTensors(NARROW, LORA)
    gradients.tensor("a_down")[...] = 1.0
    step = make_step("sgd", {"learning_rate": 1.0})

    def state() -> native.OptimizerState:
        return native.OptimizerState(LAYER, LORA, "sgd")

    bad = [
        ([gradients, narrow], good, state()),
        ([gradients], narrow, state()),
        ([gradients], good, native.OptimizerState(NARROW, LORA, "sgd")),
        ([], good, state()),
    ]
    for layer in bad:
        with pytest.raises(native.InvalidArgument):
            engine.step([(step, [gradients], good, state(), None), (step, *layer, None)])
    assert not good.tensor("a_down").any()


@pytest.mark.parametrize(
    ("kind", "numbers", "sentence"),
    [
        ("lion", {"learning_rate": 1.0}, "adamw, adam, sgd, adafactor"),
        ("adamw", {"learning_rate": -1.0}, "lr, expected at least 0"),
        ("adam", {"learning_rate": 1.0, "beta2": 1.0}, "beta2, expected 0 <= beta2 < 1"),
        ("adamw", {"learning_rate": float("nan")}, "lr, expected at least 0"),
        ("sgd", {"learning_rate": 1.0, "nesterov": True}, "nesterov, which needs momentum"),
        ("adafactor", {"learning_rate": 1.0, "clip_threshold": 0.5}, "d, expected at least 1"),
    ],
)
def test_numbers_without_a_meaning_are_refused(kind: str, numbers: dict[str, float], sentence: str) -> None:
    with pytest.raises(native.InvalidArgument, match=sentence):
        native.OptimizerUpdate(kind, **numbers)  # type: ignore[arg-type]


def test_a_step_of_another_kind_than_the_state_is_refused() -> None:
    tensors, state = native.AdapterTensors(LAYER, LORA), native.OptimizerState(LAYER, LORA, "sgd")
    with pytest.raises(native.InvalidArgument, match="the state is of sgd, the step of adamw"):
        native.Engine(1).step([(make_step("adamw", {"learning_rate": 1.0}), [tensors], tensors, state, None)])
