"""A ticket is used or released exactly once, whatever decides when the forward runs."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from kt_expert_client.errors import UnsupportedModel
from support.counting_layer import CountingLayer, Model, one
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

pytestmark = pytest.mark.parametrize("at_once", [False, True], ids=["pending", "at once"])


@contextlib.contextmanager
def saved_on_cpu() -> Iterator[None]:
    with torch.autograd.graph.save_on_cpu():
        yield


REGIMES: dict[str, tuple[Callable[[Model], Model], int]] = {
    # how the two-layer model is run, and how many forwards that takes
    "plain": (lambda model: model, 2),
    "non-reentrant": (lambda model: lambda x: checkpoint(model, x, use_reentrant=False), 4),
    "reentrant": (lambda model: lambda x: checkpoint(model, x, use_reentrant=True), 4),
}


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("on_cpu", [False, True])
@pytest.mark.parametrize("regime", REGIMES)
def test_no_ticket_outlives_its_backward(regime: str, on_cpu: bool, early_stop: bool, *, at_once: bool) -> None:
    wrap, forwards = REGIMES[regime]
    layer = CountingLayer()
    experts = one(layer, at_once=at_once)
    x = torch.ones(3, 2, requires_grad=True)
    with set_checkpoint_early_stop(early_stop), saved_on_cpu() if on_cpu else contextlib.nullcontext():
        y = wrap(lambda x: experts(experts(x)))(x)
        gc.collect()
        if regime != "plain":
            assert not layer.live  # the first pass keeps nothing
        y.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 4.0))
    assert not layer.live
    assert layer.forwards in (forwards, forwards - 1)  # the last output is needed by nobody in a second pass
    assert layer.peak <= 2


def _selective(policy: CheckpointPolicy) -> Callable[[Model], Model]:
    def choose(context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        del context, args, kwargs
        return policy if operator == torch.ops.kt_expert.experts.default else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, choose)
    return lambda model: lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(
    ("policy", "forwards"), [(CheckpointPolicy.MUST_SAVE, 2), (CheckpointPolicy.MUST_RECOMPUTE, 4)], ids=["saved", "computed"]
)
def test_selective_checkpointing_keeps_tickets_or_asks_again(
    policy: CheckpointPolicy, forwards: int, early_stop: bool, *, at_once: bool
) -> None:
    layer = CountingLayer()
    experts = one(layer, at_once=at_once)
    x = torch.ones(3, 2, requires_grad=True)
    with set_checkpoint_early_stop(early_stop):
        y = _selective(policy)(lambda x: experts(experts(x).sin()))(x)
        gc.collect()
        assert len(layer.live) == (2 if policy == CheckpointPolicy.MUST_SAVE else 0)
        y.sum().backward()
    del y
    gc.collect()
    expected = 4 * torch.cos(torch.tensor(2.0))
    torch.testing.assert_close(x.grad, torch.full((3, 2), expected))
    assert layer.forwards == forwards
    assert not layer.live


def test_a_ticket_lives_as_long_as_its_graph(*, at_once: bool) -> None:
    layer = CountingLayer()
    x = torch.ones(3, 2, requires_grad=True)
    y = one(layer, at_once=at_once)(x).sum()
    y.backward(retain_graph=True)
    assert len(layer.live) == 1
    y.backward()
    gc.collect()
    assert torch.equal(x.grad, torch.full((3, 2), 4.0))
    assert not layer.live


def test_only_what_autograd_collects_is_asked_for(*, at_once: bool) -> None:
    layer = CountingLayer()
    first, frozen, last = (torch.tensor(float(number), requires_grad=number != 2) for number in (1, 2, 3))
    x = torch.ones(3, 2, requires_grad=True)
    y = one(layer, first, frozen, last, at_once=at_once)(x).sum()
    torch.autograd.grad(y, [x], retain_graph=True)
    y.backward(inputs=[last], retain_graph=True)
    y.backward(retain_graph=True)
    assert layer.wanted == [[], [3.0], [1.0, 3.0]]
    assert (first.grad, frozen.grad, last.grad) == (torch.tensor(1.0), None, torch.tensor(2.0))
    with pytest.raises(UnsupportedModel, match=r"autograd\.grad was asked for the gradient of a remote parameter"):
        torch.autograd.grad(y, [first])


def test_without_gradients_nothing_is_kept(*, at_once: bool) -> None:
    layer = CountingLayer()
    with torch.no_grad():
        one(layer, at_once=at_once)(torch.ones(3, 2, requires_grad=True))
    one(layer, at_once=at_once)(torch.ones(3, 2))
    assert layer.peak == 0


def test_a_graph_that_is_dropped_releases_its_tickets(*, at_once: bool) -> None:
    layer = CountingLayer()
    y = one(layer, at_once=at_once)(torch.ones(3, 2, requires_grad=True)).sum()
    assert len(layer.live) == 1
    del y
    gc.collect()
    assert not layer.live
