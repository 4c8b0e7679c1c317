"""Work that makes, extends, copies and removes adapters, and changes gradients in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import kt_expert_native as native
import numpy as np
from kt_expert_proto.lora import LayerLora, tensor_names
from kt_expert_proto.v1.session_pb2 import ResultHead
from numpy.typing import NDArray

from kt_expert_server.adapters.adapter import Adapter, AdapterLayer
from kt_expert_server.adapters.sizes import TrainingBytes, check_lora, layer_bytes
from kt_expert_server.adapters.tensor_sets import TensorSet, find_adapter, resolve
from kt_expert_server.adapters.window import Windows
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.passes import Tools, Trained
from kt_expert_server.engine.training_memory import Reserve, reserve_all, reserve_training
from kt_expert_server.engine.work import Outcome, WholeWork
from kt_expert_server.errors import WrongPhase
from kt_expert_server.model.loader import BaseModel


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """An adapter that is to be there, with at least these layers; or a copy of another one."""

    name: str
    lora: tuple[LayerLora, ...] = ()
    copy_of: str = ""
    trainable: bool = False
    seed: int | None = None  # None: zero
    maker: str = ""  # the instance that asks


@dataclass(frozen=True, slots=True)
class Owner:
    """The run that adapters belong to."""

    name: str
    model: BaseModel
    engine: native.Engine
    adapters: dict[str, Adapter]
    moment_dtype: str
    training: Callable[[Sequence[LayerLora]], TrainingBytes]


class CreateAdapterWork(WholeWork):
    """Everything that was asked for is there afterwards, or nothing has changed."""

    def __init__(
        self, reserve: Reserve, owner: Owner, request: AdapterRequest, windows: Callable[[], Sequence[Windows]]
    ) -> None:
        super().__init__()
        self._reserve, self._owner, self._request, self._windows = reserve, owner, request, windows
        self._adapter = Adapter(request.name, owner.moment_dtype, request.maker)
        self._asked: list[LayerLora] = []
        self._made: list[AdapterLayer] = []
        self._is_trained = False

    def prepare(self) -> None:
        """Raises NotFound, InvalidRequest, AlreadyExists, WrongPhase or OutOfCapacity."""
        owner, request = self._owner, self._request
        existing, asked = owner.adapters.get(request.name), request.lora
        if request.copy_of:  # one that is there is another rank's copy, or was made before
            asked = () if existing is not None else find_adapter(owner.adapters, request.copy_of).lora
        check_lora(owner.model, asked)
        self._adapter = existing or Adapter(request.name, owner.moment_dtype, request.maker)
        self._asked = self._adapter.missing(asked)
        self._require_unused(self._asked)
        old = [self._adapter.layers[each.layer].lora for each in self._asked if each.layer in self._adapter.layers]
        size = sum(layer_bytes(owner.model, each) for each in self._asked)
        size -= sum(layer_bytes(owner.model, each) for each in old)
        for each in reserve_all(self._reserve, {Kind.ADAPTERS: size}, owner.name, request.name):
            self.held.add(each)
        self._is_trained = request.trainable or self._adapter.is_trained
        if self._is_trained:
            everything = {each.layer: each for each in (*self._adapter.lora, *self._asked)}
            needed = owner.training([*everything.values()])
            if self._adapter.is_trained:
                needed = needed.beyond(owner.training(self._adapter.lora))
            for each in reserve_training(self._reserve, needed, owner.name, request.name):
                self.held.add(each)

    def _require_unused(self, changed: Sequence[LayerLora]) -> None:
        """Raises WrongPhase where a layer that is to get other tensors has moments or gradients."""
        for each in changed:
            layer = self._adapter.layers.get(each.layer)
            if layer is None:
                continue
            has_gradients = any(windows.of(self._adapter.name).there(each.layer) for windows in self._windows())
            if layer.state is not None or has_gradients:
                raise WrongPhase(
                    f"layer {each.layer} of adapter {self._adapter.name!r} is being trained with {layer.lora} and is asked for "
                    f"{each}; add projections before its first backward, or choose another name"
                )

    def run(self) -> None:
        owner, request = self._owner, self._request
        for lora in self._asked:
            made, old = AdapterLayer.make(owner.model, lora, owner.engine), self._adapter.layers.get(lora.layer)
            if request.seed is not None:
                made.initialise(request.seed)
            source = owner.adapters[request.copy_of].layers[lora.layer] if request.copy_of else None
            for each in (source, old):
                if each is not None:
                    made.copy_parameters(each)
            made.encode()
            self._made.append(made)

    def commit(self) -> Outcome:
        adapter, created = self._adapter, bool(self._made) or self._request.name not in self._owner.adapters
        self._owner.adapters[self._request.name] = adapter
        for layer in self._made:
            adapter.layers[layer.lora.layer] = layer
            for windows in self._windows():
                windows.of(adapter.name).forget_layer(layer.lora.layer)
        adapter.held += self.held.take()
        adapter.is_trained = self._is_trained
        return Outcome(ResultHead(created=created))


class DeleteAdapterWork(WholeWork):
    """Its tickets are stale and its memory is free afterwards. Nothing happens where it is gone: every rank asks for it."""

    def __init__(self, adapters: dict[str, Adapter], name: str, windows: Callable[[], Sequence[Windows]]) -> None:
        super().__init__()
        self._adapters, self._name, self._windows = adapters, name, windows

    def run(self) -> None:
        pass

    def commit(self) -> Outcome:
        adapter = self._adapters.pop(self._name, None)
        if adapter is not None:
            adapter.release()
        for windows in self._windows():
            windows.forget(self._name)
        return Outcome(ResultHead())


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of gradients in place: times a number, between two, or zero."""

    sets: tuple[TensorSet, ...]
    scale: float | None = None
    least: float | None = None
    most: float | None = None
    zero: bool = False


class EditWork(WholeWork):
    """Of one member, in order. A gradient that is not there stays so, unless it is to be zero: a norm or a step will tell."""

    def __init__(self, tools: Tools, trained: Trained, edits: Sequence[Edit]) -> None:
        super().__init__()
        self._tools, self._trained, self._edits = tools, trained, edits

    def prepare(self) -> None:
        """Raises NotFound for an adapter, layer or tensor there is not."""
        for edit in self._edits:
            for each in resolve(self._trained.adapters, [self._trained.windows], edit.sets):
                self._trained.reserve_training(self._tools, each.adapter)
                self._trained.windows.begin(each.adapter.name)

    def run(self) -> None:
        windows = self._trained.windows
        for edit in self._edits:
            for each in resolve(self._trained.adapters, [windows], edit.sets):
                window = windows.of(each.adapter.name)
                accumulator = window.accumulator(each.index, each.layer)
                for name in tensor_names(each.bits if edit.zero else each.bits & window.there(each.index)):
                    _change(accumulator.tensor(name), edit)

    def commit(self) -> Outcome:
        windows = self._trained.windows
        for edit in self._edits:
            for each in list(resolve(self._trained.adapters, [windows], edit.sets)):
                if edit.zero:
                    windows.of(each.adapter.name).add(each.index, each.bits)
        return Outcome(ResultHead())


def _change(values: NDArray[np.float32], edit: Edit) -> None:
    if edit.zero:
        values[...] = 0.0
    elif edit.scale is not None:
        np.multiply(values, np.float32(edit.scale), out=values)
    else:
        np.clip(values, edit.least, edit.most, out=values)
