"""Expert weights as parameters of the trainer: the base model's, until somebody trains or writes them, and from then on the
run's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from kt_expert_proto.lora import BASE, PARAMETER
from torch import nn

from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.parameters.matrix import BIAS, DOWN, GATE_UP, WEIGHT, Matrix, ParameterSource, Place
from kt_expert_client.parameters.merged import Merged
from kt_expert_client.parameters.tensor import RemoteTensor, Stored, source_behind, source_of
from kt_expert_client.weight_layout import WeightLayout

if TYPE_CHECKING:
    from kt_expert_client.parameters.store import ParameterStore

WEIGHTS_ADAPTER = "weights"
_PLACES = {
    "gate_up_proj": (GATE_UP, WEIGHT),
    "down_proj": (DOWN, WEIGHT),
    "gate_up_proj_bias": (GATE_UP, BIAS),
    "down_proj_bias": (DOWN, BIAS),
}


class WeightSet:
    """The expert weights of one model, or of one copy of it: `layers` are those that the run has of its own, in an adapter."""

    def __init__(self, store: ParameterStore, adapter: str = WEIGHTS_ADAPTER, layers: frozenset[int] = frozenset()) -> None:
        self.store, self.adapter, self._layers = store, adapter, layers

    @property
    def layers(self) -> frozenset[int]:
        return self._layers | self.store.kept_layers(self.adapter)

    def own(self, layer: int, *, trainable: bool) -> None:
        """From now on the layer's weights are the run's own; where they are to be trained, so are those of all layers that are:
        memory is refused for all at once, or for none. Raises OutOfCapacity."""
        if layer in self.layers:
            return
        self._add({layer} | (self.store.gradients.trained_layers(self.adapter) if trainable else set()), trainable=trainable)

    def own_all(self, layers: Iterable[int]) -> None:
        """own() of several layers that are to be trained: their memory is reserved together."""
        self._add(set(layers), trainable=True)

    def _add(self, layers: set[int], *, trainable: bool) -> None:
        added = layers - self.layers
        if not added:
            return
        merged = [source for source in self.store.gradients.weight_sources(self.adapter, added) if source.merged]
        self.store.make_weights(self.adapter, sorted(added), trainable=trainable)
        for source in merged:  # one at a time: all layers' weights would not fit here
            source.matrix.put(source.read(), PARAMETER)
        for source in merged:
            source.merged = ()
        self._layers |= added

    def copy(self, memo: dict[int, Any]) -> WeightSet:
        """The same for all that are copied with one memo."""
        if id(self) not in memo:
            name = self.store.copy_name(WEIGHTS_ADAPTER)
            if self.layers:
                self.store.copy_adapter(self.adapter, name)
            memo[id(self)] = WeightSet(self.store, name, self.layers)
        copied: WeightSet = memo[id(self)]
        return copied


@dataclass(frozen=True, slots=True)
class WeightShape:
    """Sizes of one layer's experts, and how the class keeps them."""

    experts: int
    hidden: int
    intermediate: int
    layout: WeightLayout

    def of(self, tensor: str) -> tuple[int, int, int]:
        """The server's."""
        kind, projection = tensor.split("_")
        if kind == "bias":
            return self.experts, 1, self.hidden if projection == "down" else self.intermediate
        rows, columns = (self.hidden, self.intermediate) if projection == "down" else (self.intermediate, self.hidden)
        return self.experts, rows, columns


class WeightMatrix(Matrix):
    """One parameter of one layer's experts."""

    def __init__(self, weights: WeightSet, place: Place, shape: WeightShape) -> None:
        super().__init__(weights.store, place)
        self.weights, self.shape = weights, shape

    @property
    def is_owned(self) -> bool:
        return self.place.layer in self.weights.layers

    def prepare(self) -> None:
        self.weights.own(self.place.layer, trainable=True)

    def read(self, part: str) -> torch.Tensor:
        """In the class's layout."""
        place, layout = self.place, self.shape.layout
        stored = BASE if part == PARAMETER and not self.is_owned else part
        parts = [self.store.read(self._key(name, stored), self.shape.of(name)) for name in place.tensors]
        if place.target == GATE_UP:
            join = layout.gate_up_to_stock if place.side == WEIGHT else layout.gate_up_bias_to_stock
            return join(parts[0], parts[1])
        return layout.down_to_stock(parts[0]) if place.side == WEIGHT else parts[0].squeeze(1)

    def write(self, values: torch.Tensor, part: str, *, step: int = 0) -> None:
        self.weights.own(self.place.layer, trainable=part != PARAMETER)
        self.put(values, part, step=step)

    def put(self, values: torch.Tensor, part: str, *, step: int = 0) -> None:
        """write() where the adapter is there."""
        place, layout = self.place, self.shape.layout
        parts: tuple[torch.Tensor, ...]
        if place.target == GATE_UP:
            split = layout.gate_up_from_stock if place.side == WEIGHT else layout.gate_up_bias_from_stock
            parts = split(values)
        else:
            parts = (layout.down_from_stock(values) if place.side == WEIGHT else values.unsqueeze(1),)
        for name, part_values in zip(place.tensors, parts, strict=True):
            self.store.write(self._key(name, part), part_values, step=step)

    def copy(self, memo: dict[int, Any]) -> WeightMatrix:
        weights = self.weights.copy(memo)
        place = Place(weights.adapter, self.place.layer, self.place.target, self.place.side)
        return self.store.hold(WeightMatrix(weights, place, self.shape))


class WeightSource(ParameterSource):
    """Weights, with what PEFT has merged into them. Implements Source."""

    matrix: WeightMatrix

    def __init__(self, matrix: WeightMatrix, merged: tuple[Merged, ...] = ()) -> None:
        super().__init__(matrix)
        self.merged = merged

    def read(self) -> torch.Tensor:
        values = super().read()
        for each in self.merged:
            values = values + each.read()
        return values

    def write(self, values: torch.Tensor) -> None:
        self.copies.keep(self)
        self.merged = ()
        super().write(values)

    def copy(self, memo: dict[int, Any]) -> WeightSource:
        return WeightSource(self.matrix.copy(memo), self.merged)

    def holds_what(self, other: WeightSource) -> bool:
        """Whether both have the same values without a look at them: nobody has changed either."""
        ours, theirs = self.matrix, other.matrix
        same_layer = ours.store is theirs.store and ours.place.layer == theirs.place.layer
        same_tensors = ours.place.tensors == theirs.place.tensors and self.merged == other.merged
        nobody_changed = ours.weights is theirs.weights or not (ours.is_owned or theirs.is_owned)
        return same_layer and same_tensors and nobody_changed


def make_weight(
    weights: WeightSet, layer: int, parameter: str, geometry: torch.Tensor, sizes: WeightShape
) -> nn.Parameter:  # fmt: skip
    """A parameter that stands for weights on the server. Raises UnsupportedModel for one there is not."""
    if parameter not in _PLACES:
        raise UnsupportedModel(f"the experts of layer {layer} have a parameter {parameter}; expected {', '.join(_PLACES)}")
    target, side = _PLACES[parameter]
    source = WeightSource(WeightMatrix(weights, Place(weights.adapter, layer, target, side), sizes))
    made = nn.Parameter(RemoteTensor(Stored(source), geometry))
    source.adopted(made)
    return made


def weight_of(tensor: object) -> WeightSource | None:
    """What stands for weights on the server; None for any other tensor, and for a copy."""
    source = source_of(tensor)
    return source if isinstance(source, WeightSource) else None


def weight_behind(tensor: object) -> WeightSource | None:
    """The same, also of a copy in another dtype, as a forward makes one of its parameters."""
    source = source_behind(tensor)
    return source if isinstance(source, WeightSource) else None
