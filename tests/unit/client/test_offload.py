"""Tickets of a model's layers belong to the run that made them."""

from __future__ import annotations

from typing import Any

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client.autograd import ExpertsCall
from kt_expert_client.errors import WrongPhase
from kt_expert_client.offload import OffloadedLayer
from kt_expert_client.options import RunOptions


class FakeRun:
    """Hands out the same numbers as any other run."""

    def __init__(self) -> None:
        self.ticket = 0
        self.used: list[int] = []
        self.released: list[int] = []

    def submit_forward(self, layer: int, x: torch.Tensor, *_: object, **__: object) -> Any:
        self.ticket += 1
        self._last = x
        return self

    def submit_backward(self, layer: int, ticket: int, grad: torch.Tensor, *, keep_ticket: bool, **_: object) -> Any:
        assert keep_ticket
        self.used.append(ticket)
        return self

    def release(self, ticket: int) -> None:
        self.released.append(ticket)

    def result(self) -> Any:
        return self._last, self._last


class FakeParameters:
    def __init__(self) -> None:
        self.run = FakeRun()
        self.open_tickets = 0

    def settle(self) -> None:
        pass


class FakeOffload:
    def __init__(self) -> None:
        self.parameters = FakeParameters()
        self.options = RunOptions()
        self.ddp_parameter = None


TICKETS: list[torch.Tensor] = []  # they are released once these are gone


def forward(layer: OffloadedLayer) -> int:
    x = torch.zeros(1, 4)
    _, ticket = layer.submit(x, x, ExpertsCall(x.long(), (), keep=True, dropout_seed=0), borrow=True).wait()
    TICKETS.append(ticket)
    return int(ticket.item())


def test_a_ticket_goes_back_to_the_run_that_made_it() -> None:
    offload = FakeOffload()
    layer = OffloadedLayer(offload, 0)  # type: ignore[arg-type]
    first_run = offload.parameters.run
    used, dropped = forward(layer), forward(layer)
    offload.parameters.run = FakeRun()  # other options, another run
    forward(layer)
    layer.submit_backward(used, torch.zeros(1, 4), []).wait()
    layer.submit_backward(used, torch.zeros(1, 4), []).wait()
    layer.release(used)
    layer.release(dropped)
    layer.release(dropped)
    assert (first_run.used, first_run.released) == ([1, 1], [1, 2])
    assert (offload.parameters.run.used, offload.parameters.run.released) == ([], [])


def test_a_ticket_that_was_released_is_refused_with_the_cause() -> None:
    layer = OffloadedLayer(FakeOffload(), 3)  # type: ignore[arg-type]
    ticket = forward(layer)
    layer.release(ticket)
    with pytest.raises(WrongPhase, match=r"of layer 3 has been released.*pin_memory=False"):
        layer.submit_backward(ticket, torch.zeros(1, 4), [])


def test_values_that_are_not_finite_are_refused_where_the_run_asks_for_it() -> None:
    offload = FakeOffload()
    offload.options = RunOptions(non_finite="refuse")
    layer = OffloadedLayer(offload, 3)  # type: ignore[arg-type]
    forward(layer)
    x, weights = torch.zeros(4, 2), torch.zeros(4, 2)
    x[2, 1] = float("nan")
    call = ExpertsCall(torch.zeros(4, 2, dtype=torch.int64), (), keep=True, dropout_seed=0)
    with pytest.raises(kt.InvalidRequest, match=r"hidden_states of layer 3 .* in 1 of 4 tokens, the first in token 2"):
        layer.submit(x, weights, call, borrow=True)
    with pytest.raises(kt.InvalidRequest, match="routing_weights of layer 3"):
        layer.submit(weights, x, call, borrow=True)
