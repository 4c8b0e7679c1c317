"""The remote parameters of one model: the run that holds them, their adapters, and what travels in and out."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from kt_expert_proto.lora import GRADIENT, LayerLora

from kt_expert_client.adapter import TensorKey
from kt_expert_client.errors import UnsupportedModel, WrongPhase
from kt_expert_client.membership import Membership
from kt_expert_client.parameters.gradients import Gradients
from kt_expert_client.parameters.lora import DOWN, LoraMatrix, LoraPlace, LoraShape
from kt_expert_client.run import Run


class ParameterStore:
    """`open_run`, a method, is called when the server is first needed, if its object is still there."""

    def __init__(self, open_run: Callable[[], tuple[Run, Membership]], dropout: float) -> None:
        # Gradients, which torch holds where the garbage collector does not look, hold this store; it must not hold the model.
        self._open_run = weakref.WeakMethod(open_run)
        self._dropout = dropout
        self._joined: tuple[Run, Membership] | None = None
        self._awaits_values = False  # other ranks' values of what was written since
        self._updates: dict[LoraPlace, int] = {}
        self._moments: dict[LoraPlace, int] = {}  # how often an optimizer began with them anew
        self._copies = itertools.count(1)
        self.gradients = Gradients(self)

    @property
    def run(self) -> Run:
        return self._join()[0]

    @property
    def world_size(self) -> int:
        return self._join()[1].world_size

    @property
    def is_open(self) -> bool:
        return self._joined is not None

    def leave(self) -> None:
        if self._joined is not None:
            self._joined[0].leave()

    def make(self, place: LoraPlace, shape: LoraShape, values: torch.Tensor | None) -> LoraMatrix:
        """A matrix of an adapter, with its values where there are some yet. Makes what the server lacks of the adapter."""
        rank = shape.rank
        if place.target == DOWN:
            lora = LayerLora(place.layer, rank_down=rank, scale_down=1.0, dropout=self._dropout)
        else:
            lora = LayerLora(place.layer, True, rank, rank, 0, 1.0, 1.0, dropout=self._dropout)
        self.run.adapters.create(place.adapter, [lora], trainable=True)
        matrix = LoraMatrix(self, place, shape)
        if values is not None:
            matrix.write(values, "parameter")
        return matrix

    def copy_of(self, matrix: LoraMatrix, memo: dict[int, Any]) -> LoraMatrix:
        """The matrix in a copy of its adapter: the same copy for all that are copied with one memo."""
        copies: dict[str, str] = memo.setdefault(id(self), {})
        name = copies.get(matrix.place.adapter)
        if name is None:
            self.settle()
            name = copies[matrix.place.adapter] = f"{matrix.place.adapter}.copy{next(self._copies)}"
            self.run.adapters.copy(matrix.place.adapter, name)
        return LoraMatrix(self, replace(matrix.place, adapter=name), matrix.shape)

    def read(self, key: TensorKey, size: tuple[int, int, int]) -> torch.Tensor:
        self.settle()
        if key.part == GRADIENT and self.world_size > 1:
            raise UnsupportedModel("a gradient of several ranks cannot be read; ask for its norm")
        return self.run.adapters.read(key, size)

    def write(self, key: TensorKey, values: torch.Tensor, *, step: int = 0) -> None:
        """Rank 0's values count, as with DDP."""
        run, member = self._join()
        if member.world_size > 1:
            self._awaits_values = True
        if member.rank == 0:
            run.adapters.write(key, values, step=step)

    def settle(self) -> None:
        """Waits until what all ranks have written is there."""
        if self._awaits_values:
            self._awaits_values = False
            self.run.adapters.norms([])

    def moments_of(self, matrix: LoraMatrix) -> int:
        """Which set of its moments the server has."""
        return self._moments.get(matrix.place, 0)

    def begin_moments(self, matrix: LoraMatrix) -> None:
        """Those of an earlier optimizer are given up."""
        self._moments[matrix.place] = self.moments_of(matrix) + 1

    def updates_of(self, matrix: LoraMatrix) -> int:
        """How many updates its moments stand for."""
        return self._updates.get(matrix.place, 0)

    def count_updates(self, matrix: LoraMatrix, count: int) -> None:
        self._updates[matrix.place] = count

    def _join(self) -> tuple[Run, Membership]:
        if self._joined is None:
            open_run = self._open_run()
            if open_run is None:
                raise WrongPhase("the model of this parameter is gone, and its run with it")
            self._joined = open_run()
        return self._joined
