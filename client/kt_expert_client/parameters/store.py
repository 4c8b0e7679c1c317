"""The remote parameters of one model: the run that holds them, their adapters, and what travels in and out."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from kt_expert_proto.lora import LayerLora

from kt_expert_client.adapter import TensorKey
from kt_expert_client.errors import WrongPhase
from kt_expert_client.membership import Membership
from kt_expert_client.parameters.agreement import await_writes
from kt_expert_client.parameters.gradients import Gradients
from kt_expert_client.parameters.lora import LoraMatrix
from kt_expert_client.parameters.matrix import DOWN, Matrix, Place
from kt_expert_client.parameters.weights import WeightSet
from kt_expert_client.run import Run

LoraMatrixT = TypeVar("LoraMatrixT", bound=LoraMatrix)
MatrixT = TypeVar("MatrixT", bound=Matrix)


@dataclass(frozen=True, slots=True)
class Joined:
    """A run, who of its members this process is, and the layers of adapters that had values before it came."""

    run: Run
    member: Membership
    kept: Mapping[str, frozenset[int]]


class ParameterStore:
    """`open_run`, a method, is called when the server is first needed, if its object is still there."""

    def __init__(self, open_run: Callable[[], Joined], dropout: float) -> None:
        # Gradients, which torch holds where the garbage collector does not look, hold this store; it must not hold the model.
        self._open_run = weakref.WeakMethod(open_run)
        self._dropout = dropout
        self._joined: Joined | None = None
        self._writes: Counter[str] = Counter()  # by adapter, on every rank; rank 0's values are the ones that count
        self._unsettled: set[str] = set()  # adapters that were written since somebody waited
        self._updates: dict[Place, int] = {}
        self._moments: dict[Place, int] = {}  # how often an optimizer began with them anew
        self._copies = itertools.count(1)
        self._versions: Counter[str] = Counter()  # of an adapter: how often its values have changed
        self._snapshots: dict[str, tuple[int, str]] = {}  # of an adapter: at which version, and its name
        self._held: Counter[str] = Counter()  # of a copy: how many objects here stand for one of its matrices
        self.open_tickets = 0  # forwards whose backward may come
        self._unused: list[str] = []  # copies that nothing stands for any more
        self.gradients = Gradients(self)
        self.weights = WeightSet(self)  # the model's own; its copies have others

    @property
    def run(self) -> Run:
        return self._join().run

    @property
    def world_size(self) -> int:
        return self._join().member.world_size

    @property
    def is_open(self) -> bool:
        return self._joined is not None

    def leave(self) -> None:
        if self._joined is not None:
            self._joined.run.leave()

    def kept_layers(self, adapter: str) -> frozenset[int]:
        """Those layers of the adapter that keep the values of an earlier start of this run."""
        return self._join().kept.get(adapter, frozenset())

    def use_dropout(self, dropout: float) -> None:
        """Of adapters that are made from now on."""
        self._dropout = dropout

    def make(self, matrix: LoraMatrixT) -> LoraMatrixT:
        """Makes what the server lacks of the matrix's adapter."""
        place, rank = matrix.place, matrix.shape.rank
        self._remove_if_unused(place)
        if place.target == DOWN:
            lora = LayerLora(place.layer, rank_down=rank, scale_down=1.0, dropout=self._dropout)
        else:
            lora = LayerLora(place.layer, True, rank, rank, 0, 1.0, 1.0, dropout=self._dropout)
        self.run.adapters.create(place.adapter, [lora], trainable=True)
        return matrix

    def copy_of(self, matrix: LoraMatrix, memo: dict[int, Any]) -> LoraMatrix:
        """The matrix in a copy of its adapter: the same copy for all that are copied with one memo."""
        name, is_new = self.name_in_copy(matrix.place.adapter, memo)
        if is_new:
            self.copy_adapter(matrix.place.adapter, name)
        return self.hold(LoraMatrix(self, replace(matrix.place, adapter=name), matrix.shape))

    def hold(self, matrix: MatrixT) -> MatrixT:
        """A matrix of a copy: the copy stays on the server for as long as one of its matrices is there."""
        self._held[matrix.place.adapter] += 1
        weakref.finalize(matrix, self._let_go, matrix.place.adapter).atexit = False
        return matrix

    def _let_go(self, adapter: str) -> None:
        """Runs when the garbage collector likes: nothing is asked of the server here."""
        self._held[adapter] -= 1
        if not self._held[adapter]:
            self._unused.append(adapter)

    def _remove_unused(self) -> None:
        """Copies whose models are gone, once no backward can come that would need one. Of several ranks, one may still use what
        another has let go."""
        while self._unused and not self.open_tickets and self.world_size == 1:
            name = self._unused.pop()
            if not self._held[name]:
                self.gradients.forget(name)
                self._snapshots = {adapter: each for adapter, each in self._snapshots.items() if each[1] != name}
                self.run.adapters.delete(name)

    def name_in_copy(self, adapter: str, memo: dict[int, Any]) -> tuple[str, bool]:
        """What an adapter is called in the copy that has this memo, and whether this is the first question."""
        copies: dict[str, str] = memo.setdefault(id(self), {})
        is_new = adapter not in copies
        if is_new:
            copies[adapter] = self.copy_name(adapter)
        return copies[adapter], is_new

    def copy_name(self, adapter: str) -> str:
        return f"{adapter}.copy{next(self._copies)}"

    def copy_adapter(self, adapter: str, name: str) -> None:
        self.settle()
        self.run.adapters.copy(adapter, name)

    def snapshot(self, adapter: str) -> str:
        """An adapter with the values that this one has now, which nothing changes."""
        version, name = self._snapshots.get(adapter, (-1, ""))
        if version != self._versions[adapter]:
            name = self.copy_name(adapter)
            self.copy_adapter(adapter, name)
            self._snapshots[adapter] = self._versions[adapter], name
        return name

    def changed(self, places: Iterable[Place]) -> None:
        """Those matrices have other values."""
        self._versions.update({place.adapter for place in places})

    def make_weights(self, adapter: str, layers: Iterable[int], *, trainable: bool) -> None:
        """The run has those layers' weights of its own from now on. Raises OutOfCapacity; nothing has changed then."""
        self.run.adapters.create(adapter, [LayerLora(layer, full=True) for layer in layers], trainable=trainable)

    def _remove_if_unused(self, place: Place) -> None:
        """An adapter of this name was deleted, and all its parameters with it: the new one may have other ranks."""
        if not self.gradients.knows(place):
            return
        if not self.gradients.forget(place.adapter):
            gc.collect()  # modules hold each other in circles
            if not self.gradients.forget(place.adapter):
                return
        self.run.adapters.delete(place.adapter)
        self._versions.update([place.adapter])

    def read(self, key: TensorKey, size: tuple[int, int, int]) -> torch.Tensor:
        self.settle()
        return self.run.adapters.read(key, size)

    def write(self, key: TensorKey, values: torch.Tensor, *, step: int = 0) -> None:
        """Rank 0's values count, as with DDP."""
        joined = self._join()
        self._writes[key.adapter] += 1
        if joined.member.rank == 0:
            joined.run.adapters.write(key, values, step=step, sequence=self._writes[key.adapter])
        else:
            self._unsettled.add(key.adapter)

    def settle(self) -> None:
        """Waits until rank 0 has written what this rank would have, and gives copies back that are not used any more. Raises
        DeadlineExceeded."""
        self._remove_unused()
        for adapter in sorted(self._unsettled):
            await_writes(self.run, adapter, self._writes[adapter])
        self._unsettled.clear()

    def moments_of(self, matrix: Matrix) -> int:
        """Which set of its moments the server has."""
        return self._moments.get(matrix.place, 0)

    def begin_moments(self, matrix: Matrix) -> None:
        """Those of an earlier optimizer are given up."""
        self._moments[matrix.place] = self.moments_of(matrix) + 1

    def updates_of(self, matrix: Matrix) -> int:
        """How many updates its moments stand for."""
        return self._updates.get(matrix.place, 0)

    def count_updates(self, matrix: Matrix, count: int) -> None:
        self._updates[matrix.place] = count

    def _join(self) -> Joined:
        if self._joined is None:
            open_run = self._open_run()
            if open_run is None:
                raise WrongPhase("the model of this parameter is gone, and its run with it")
            self._joined = open_run()
        return self._joined
