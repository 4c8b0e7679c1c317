"""A ticket is used or released exactly once, whatever decides when the forward runs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from kt_expert_client.autograd import ExpertsFunction
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

Model = Callable[[torch.Tensor], torch.Tensor]


class CountingLayer:
    """Doubles its input; remembers which tickets live."""

    def __init__(self) -> None:
        self.live: set[int] = set()
        self.peak = self.forwards = 0

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        keep: bool,
        use_adapter: bool,
        dropout_seed: int,
    ) -> tuple[torch.Tensor, int]:
        assert use_adapter
        assert dropout_seed == 5
        assert expert_ids.shape == routing_weights.shape
        self.forwards += 1
        if keep:
            self.live.add(self.forwards)
            self.peak = max(self.peak, len(self.live))
        return hidden_states.detach() * 2, self.forwards if keep else 0

    def backward(self, ticket: int, grad_output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.live.remove(ticket)
        return grad_output * 2, torch.zeros(len(grad_output), 1)

    def release(self, ticket: int) -> None:
        self.live.discard(ticket)


def one(layer: CountingLayer) -> Model:
    def run(x: torch.Tensor) -> torch.Tensor:
        weights, ids = torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64)
        keep = torch.is_grad_enabled() and x.requires_grad
        return ExpertsFunction.apply(x, weights, None, ids, layer, keep, True, 5)

    return run


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
def test_no_ticket_outlives_its_backward(regime: str, on_cpu: bool, early_stop: bool) -> None:
    wrap, forwards = REGIMES[regime]
    layer = CountingLayer()
    experts = one(layer)
    x = torch.ones(3, 2, requires_grad=True)
    with set_checkpoint_early_stop(early_stop), saved_on_cpu() if on_cpu else contextlib.nullcontext():
        y = wrap(lambda x: experts(experts(x)))(x)
        gc.collect()
        if regime != "plain":
            assert not layer.live  # the first pass keeps nothing
        y.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 4.0))
    assert not layer.live
    assert layer.forwards == forwards
    assert layer.peak == 2


def test_without_gradients_nothing_is_kept() -> None:
    layer = CountingLayer()
    with torch.no_grad():
        one(layer)(torch.ones(3, 2, requires_grad=True))
    one(layer)(torch.ones(3, 2))
    assert layer.peak == 0


def test_a_graph_that_is_dropped_releases_its_tickets() -> None:
    layer = CountingLayer()
    y = one(layer)(torch.ones(3, 2, requires_grad=True))
    assert len(layer.live) == 1
    del y
    gc.collect()
    assert not layer.live
