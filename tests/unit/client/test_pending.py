"""The experts' output waits at its first use, both ways, and is the output wherever anybody looks at it."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kt_expert_client.errors import OutOfCapacity, WrongPhase
from kt_expert_client.pending import PendingTensor
from support.counting_layer import CountingLayer, one
from torch.utils.checkpoint import checkpoint


def ones(*, grad: bool = True) -> torch.Tensor:
    return torch.ones(3, 2, requires_grad=grad)


class Shared(torch.autograd.Function):
    """Shared experts, that are seen in the log: 3 x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, log: list[str]) -> torch.Tensor:
        ctx.log = log
        log.append("shared forward")
        return 3 * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ctx.log.append("shared backward")
        return 3 * gradients[0], None


def block(layer: CountingLayer, x: torch.Tensor) -> torch.Tensor:
    x = x * 1.0
    routed = one(layer)(x).view(3, 2, 1).to(torch.float64)  # a view and a cast wait as well
    shared = Shared.apply(x, layer.log)
    return routed.squeeze(-1) + shared


BOTH_WAYS = [
    "sends forward", "shared forward", "waits for forward", "sends backward", "shared backward", "waits for backward",
]  # fmt: skip


def run_plainly(layer: CountingLayer, x: torch.Tensor) -> torch.Tensor:
    return block(layer, x)


def under_autocast(layer: CountingLayer, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return block(layer, x)


@pytest.mark.parametrize("run", [run_plainly, under_autocast])
def test_what_does_not_need_the_output_runs_meanwhile(
    run: Callable[[CountingLayer, torch.Tensor], torch.Tensor],
) -> None:
    layer, x = CountingLayer(), ones()
    y = run(layer, x)
    assert type(y) is torch.Tensor
    y.sum().backward()
    assert layer.log == BOTH_WAYS
    assert torch.equal(y, torch.full((3, 2), 5.0, dtype=torch.float64))
    assert torch.equal(x.grad, torch.full((3, 2), 5.0))
    del y
    gc.collect()
    assert not layer.live


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_checkpointing(*, use_reentrant: bool) -> None:
    layer, x = CountingLayer(), ones()
    y = checkpoint(block, layer, x, use_reentrant=use_reentrant)
    gc.collect()
    assert not layer.live
    y.sum().backward()
    assert layer.log[-3:] == ["sends backward", "shared backward", "waits for backward"]
    assert torch.equal(x.grad, torch.full((3, 2), 5.0))
    assert layer.forwards == 2
    del y
    gc.collect()
    assert not layer.live


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_output_that_leaves_its_region(*, use_reentrant: bool) -> None:
    """It is used outside, and in another region, that is computed again too."""
    layer, x = CountingLayer(), ones()
    inner = checkpoint(one(layer), x * 1.0, use_reentrant=use_reentrant)
    assert isinstance(inner, PendingTensor)
    outer = checkpoint(lambda value: value.sin() * value, inner, use_reentrant=use_reentrant)
    (outer + inner).sum().backward()
    two = torch.full((3, 2), 2.0, requires_grad=True)
    (two.sin() * two + two).sum().backward()
    torch.testing.assert_close(x.grad, 2 * two.grad)


LOOKS: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda y: y.detach().numpy().tolist(),
    "item": lambda y: y[0, 0].item(),
    "repr": repr,
    "bool": lambda y: bool(y.isfinite().all()),
    "list": lambda y: y.tolist(),
    "deep copy": lambda y: copy.deepcopy(y.detach()).tolist(),
    "saved": lambda y: torch.save(y, io.BytesIO()),
    "stack": lambda y: torch.stack([y, y]).tolist(),
    "in a dict": lambda y: torch.utils._pytree.tree_map(lambda each: each + 0, {"y": y})["y"].tolist(),
    "compared": lambda y: torch.equal(y, torch.full((3, 2), 2.0)),
    "len and size": lambda y: (len(y), y.size(), y.shape, y.numel()),
    "formatted": lambda y: f"{y.sum():.1f}",
    "norm without gradients": lambda y: float(torch.no_grad()(torch.linalg.vector_norm)(y)),
    "storage": lambda y: y.untyped_storage().nbytes(),
    "out": lambda y: torch.add(y, 1, out=torch.empty(3, 2)).tolist() if not y.requires_grad else None,
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("look", LOOKS)
def test_whoever_looks_sees_the_output(look: str, *, grad: bool) -> None:
    layer, x = CountingLayer(), ones(grad=grad)
    y = one(layer)(x)
    plain = x * 2
    assert isinstance(y, PendingTensor)
    if look != "repr":  # names the operation that made it
        assert LOOKS[look](y) == LOOKS[look](plain)
    else:
        assert repr(y.detach()) == repr(plain.detach())
    if grad:
        y.sum().backward()
        assert torch.equal(x.grad, torch.full((3, 2), 2.0))
        assert layer.log.count("sends backward") == 1


def test_metadata_does_not_wait() -> None:
    layer = CountingLayer()
    y = one(layer)(ones())
    found = (y.shape, y.dtype, y.device, y.dim(), y.size(0), y.is_cuda, y.requires_grad, y.is_floating_point(), len(y))
    assert found == ((3, 2), torch.float32, torch.device("cpu"), 2, 3, False, True, True, 3)
    assert y.reshape(6).unsqueeze(0).to(torch.bfloat16).shape == (1, 6)
    assert layer.log == ["sends forward"]


def test_in_place_at_first_use() -> None:
    layer, x = CountingLayer(), ones()
    y = one(layer)(x)
    y += 1
    assert torch.equal(y.detach(), torch.full((3, 2), 3.0))
    y.square().sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 12.0))


class InsideAFunction(torch.autograd.Function):
    """Computes with the values itself, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradients[0]


class AsItIs(torch.autograd.Function):
    """Returns its input, as a module's backward hooks do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        del ctx
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        del ctx
        return 10 * gradients[0]


USES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {
    # what a model does with the output 2 x, and the gradient at x = 1
    "a Function": (InsideAFunction.apply, 8.0),
    "a Function and an operation": (lambda y: InsideAFunction.apply(y) + y, 10.0),
    "an operation and a Function": (lambda y: y + InsideAFunction.apply(y), 10.0),
    "a Function as it is": (lambda y: AsItIs.apply(y) + 1, 20.0),
    "a Function as it is, and an operation": (lambda y: AsItIs.apply(y).view(6).sum() + y.sum(), 22.0),
    "reentrant checkpointing": (lambda y: checkpoint(torch.square, y, use_reentrant=True), 8.0),
    "checkpointing": (lambda y: checkpoint(torch.square, y, use_reentrant=False), 8.0),
    "two operations": (lambda y: y * y + y.view(6).sum(), 20.0),
}


@pytest.mark.parametrize("use", USES)
def test_gradients_whatever_uses_it(use: str) -> None:
    compute, expected = USES[use]
    layer, x = CountingLayer(), ones()
    loss = compute(one(layer)(x)).sum()
    for passes in (1, 2):
        loss.backward(retain_graph=passes == 1)
        assert torch.equal(x.grad, torch.full((3, 2), passes * expected))
    del loss
    gc.collect()
    assert not layer.live


@pytest.mark.parametrize("use", [use for use in USES if "checkpointing" not in use])
def test_gradients_under_checkpointing(use: str) -> None:
    compute, expected = USES[use]
    layer, x = CountingLayer(), ones()
    checkpoint(lambda x: compute(one(layer)(x)), x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), expected))


@pytest.mark.parametrize("kind", ["module", "tensor", "input"])
def test_hooks_of_modules_and_tensors(kind: str) -> None:
    layer, seen = CountingLayer(), []

    class Experts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return one(layer)(x)

    module, x = Experts(), ones()
    if kind == "module":
        module.register_full_backward_hook(lambda *given: seen.append(given[2][0][0, 0].item()))
    elif kind == "input":
        module.register_full_backward_pre_hook(lambda *given: seen.append(given[1][0][0, 0].item()))
    else:

        def watch(module: torch.nn.Module, given: Any, output: torch.Tensor) -> None:
            del module, given
            output.register_hook(lambda gradient: seen.append(gradient[0, 0].item()))

        module.register_forward_hook(watch)
    (module(x) * 4).sum().backward()
    assert seen == [4.0]
    assert torch.equal(x.grad, torch.full((3, 2), 8.0))


def test_parameters_and_what_is_collected() -> None:
    layer = CountingLayer()
    first, last = (torch.tensor(number, requires_grad=True) for number in (1.0, 2.0))
    x = ones()
    y = (one(layer, first, last)(x) + 1).sum()
    y.backward(inputs=[last], retain_graph=True)
    y.backward()
    assert layer.wanted == [[2.0], [1.0, 2.0]]
    assert (first.grad, last.grad) == (torch.tensor(1.0), torch.tensor(2.0))


def test_an_error_comes_at_each_use() -> None:
    layer = CountingLayer(error=OutOfCapacity("layer 7 has no memory for it"))
    y = one(layer)(ones())
    for _ in range(2):
        with pytest.raises(OutOfCapacity, match="layer 7 has no memory"):
            y.sum()


def test_an_output_that_nobody_uses_is_given_up() -> None:
    layer = CountingLayer()
    y = one(layer)(ones())
    del y
    gc.collect()
    assert layer.abandoned == 1
    z = one(layer)(ones()) + 1
    del z
    gc.collect()
    assert layer.abandoned == 1
    assert not layer.live


def test_an_input_that_was_changed_before_is_said() -> None:
    layer, x = CountingLayer(), ones() * 1.0
    y = one(layer)(x)
    x.detach().zero_()
    with pytest.raises(WrongPhase, match="changed in place before their output was used"):
        y.sum()


def test_inference_mode() -> None:
    layer = CountingLayer()
    with torch.inference_mode():
        y = one(layer)(torch.ones(3, 2))
        assert torch.equal(y + 1, torch.full((3, 2), 3.0))
    kept = one(layer)(ones())
    with torch.inference_mode():
        assert float(kept.sum()) == 12.0


def test_a_look_without_gradients_leaves_them() -> None:
    layer, x = CountingLayer(), ones()
    y = one(layer)(x)
    with torch.no_grad():
        assert float(y.sum()) == 12.0
    (y * 3).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 6.0))
    assert layer.log.count("sends backward") == 1


def test_autograd_grad() -> None:
    layer, x = CountingLayer(), ones()
    (found,) = torch.autograd.grad((one(layer)(x) * 5).sum(), [x])
    assert torch.equal(found, torch.full((3, 2), 10.0))
