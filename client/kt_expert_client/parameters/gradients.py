"""Gradients of remote parameters: which of them mean something, what is to be done to them before they are used next, and
their norms.

A gradient lives from the first backward that finds its parameter's `.grad` empty to the next such one, and until then for
whoever holds it, though `.grad` may be None. Scaling, clamping and
zeroing are remembered and travel with the next request that needs them. Norms of all live gradients are asked for together,
and kept until a gradient changes.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from kt_expert_proto.lora import tensor_names
from kt_expert_proto.v1 import session_pb2 as pb

from kt_expert_client.adapter import TensorSet
from kt_expert_client.errors import UnsupportedModel, WrongPhase
from kt_expert_client.parameters.matrix import BIAS, WEIGHT, GradientSource, Matrix, Place, gradient_of
from kt_expert_client.parameters.moving import in_place_of
from kt_expert_client.parameters.tensor import LateCopy, RemoteTensor, Stored, source_behind
from kt_expert_client.parameters.weights import WeightSource, weight_of

if TYPE_CHECKING:
    from kt_expert_client.parameters.store import ParameterStore

_NO_PASS = -1
_STEPS_UNTAKEN = 3  # two optimizers may step in turns
_NAMED = 4  # parameters in a message


@dataclass(slots=True)
class _Slot:
    """The gradient of one parameter."""

    matrix: weakref.ref[Matrix]  # lives as long as anything that stands for it
    parameter: weakref.ref[torch.Tensor]
    generation: int = 0
    begun_in: int = _NO_PASS  # the autograd pass that began it
    is_spent: bool = False  # a step has taken it; it is there until it is cleared
    scale: float = 1.0  # to be multiplied with
    edits: list[tuple[str, float, float]] = field(default_factory=list)  # before that: zero, scale or clamp
    passed_over: int = 0  # steps of optimizers that did not take it, one after the other
    is_fresh: bool = False  # a backward has added to it since an optimizer stepped
    handle: weakref.ref[GradientSource] | None = None  # whatever stands for it has this one

    def source(self, matrix: Matrix) -> GradientSource:
        """The gradient as it is now."""
        held = self.handle() if self.handle is not None else None
        if held is None or held.generation != self.generation:
            held = GradientSource(matrix, self.generation)
            self.handle = weakref.ref(held)
        return held

    def is_held(self) -> bool:
        held = self.handle() if self.handle is not None else None
        return held is not None and held.generation == self.generation


class Gradients:
    """Of all remote parameters of a model."""

    def __init__(self, store: ParameterStore) -> None:
        self._store = store
        self._slots: dict[Place, _Slot] = {}
        self._norms: dict[float, dict[Place, float]] = {}
        self._has_warned = False

    def add(self, matrix: Matrix, parameter: torch.Tensor) -> None:
        """A parameter from now on."""
        self._slots[matrix.place] = _Slot(weakref.ref(matrix), weakref.ref(parameter))

    def follow(self, matrix: Matrix, parameter: torch.Tensor) -> None:
        """The parameter as it is now: casts and moves of modules put other objects in its place. Where the one before is gone,
        a copy of it has come in its place."""
        slot = self._slots.get(matrix.place)
        if slot is None or slot.parameter() is parameter:
            return
        is_copy = isinstance(parameter, RemoteTensor) and isinstance(parameter.remote, LateCopy)
        if not is_copy or (slot.parameter() is None and in_place_of(parameter, source_behind(parameter))):
            slot.parameter = weakref.ref(parameter)

    def knows(self, place: Place) -> bool:
        return place in self._slots

    def trained_layers(self, adapter: str) -> set[int]:
        """Layers some of whose weights are to be trained."""
        return {source.matrix.place.layer for source, is_trained in self._weights(adapter) if is_trained}

    def weight_sources(self, adapter: str, layers: Iterable[int]) -> list[WeightSource]:
        """What the weights of those layers stand for."""
        wanted = set(layers)
        return [source for source, _ in self._weights(adapter) if source.matrix.place.layer in wanted]

    def _weights(self, adapter: str) -> Iterator[tuple[WeightSource, bool]]:
        for place, slot in self._slots.items():
            parameter = slot.parameter() if place.adapter == adapter and place.side in (WEIGHT, BIAS) else None
            source = weight_of(parameter)
            if parameter is not None and source is not None:
                yield source, parameter.requires_grad

    def forget(self, adapter: str) -> bool:
        """Whether nothing of an adapter is left; what is known of it is dropped then."""
        places = [place for place in self._slots if place.adapter == adapter]
        if not places or any(self._slots[place].matrix() is not None for place in places):
            return False
        for place in places:
            del self._slots[place]
        self.changed()
        return True

    def changed(self) -> None:
        """Some gradient has other values."""
        self._norms.clear()

    def require_live(self, gradient: GradientSource) -> None:
        """Raises WrongPhase for a gradient that was cleared and begun anew since."""
        if self._slot(gradient).generation != gradient.generation:
            raise WrongPhase(f"{gradient.name} was replaced by a newer one; keep gradients with .clone()")

    # Backward

    def target(self, matrix: Matrix, parameter: torch.Tensor) -> tuple[GradientSource, int, int]:
        """For a backward that is about to add to the parameter's gradient: what that is, and the bits of tensors that begin
        anew, and that go on from what a step has taken."""
        slot, bits, current = self._slots[matrix.place], matrix.place.bits, torch._C._current_graph_task_id()
        known = slot.parameter()
        parameter = parameter if known is None else known  # what a forward was given may be a cast of it
        if parameter._backward_hooks:
            raise UnsupportedModel(
                f"{matrix.place} has a tensor hook, which changes gradients before they are added up; on the server they are "
                "added up at once. Use register_post_accumulate_grad_hook, or lora_location='trainer'"
            )
        held, self_begun = parameter.grad, slot.begun_in == current
        gradient = gradient_of(held)
        if held is not None and gradient is None:
            raise UnsupportedModel(
                f".grad of {matrix.place} was replaced by a tensor of this process; use .grad.copy_(), or set it to None"
            )
        matrix.prepare()
        self.changed()
        slot.is_fresh = True
        if gradient is None and not self_begun:
            slot.generation, slot.begun_in, slot.is_spent = slot.generation + 1, current, False
            slot.scale, slot.edits = 1.0, []
            return slot.source(matrix), bits, 0
        if gradient is not None:
            self.require_live(gradient)
        if slot.edits and slot.edits[-1][0] == "zero" and slot.scale == 1.0:
            slot.edits, slot.is_spent, slot.begun_in = [], False, current
            return slot.source(matrix), bits, 0
        if slot.edits or slot.scale != 1.0:
            self.flush()
        continued = bits if slot.is_spent else 0
        slot.is_spent = False
        return slot.source(matrix), 0, continued

    # Changes in place

    def scale(self, gradient: GradientSource, factor: float) -> None:
        self.require_live(gradient)
        self._slot(gradient).scale *= factor
        self.changed()

    def clamp(self, gradient: GradientSource, least: float | None, most: float | None) -> None:
        self.require_live(gradient)
        if self._store.world_size > 1:
            raise UnsupportedModel("clipping gradients by value needs their average over the ranks; use clip_grad_norm_")
        self._edit(gradient, "clamp", -math.inf if least is None else least, math.inf if most is None else most)

    def zero(self, gradient: GradientSource) -> None:
        self.require_live(gradient)
        slot = self._slot(gradient)
        slot.scale, slot.edits = 1.0, []
        self._edit(gradient, "zero", 0.0, 0.0)

    def _edit(self, gradient: GradientSource, what: str, first: float, second: float) -> None:
        slot = self._slot(gradient)
        if slot.scale != 1.0:
            slot.edits.append(("scale", slot.scale, 0.0))
            slot.scale = 1.0
        slot.edits.append((what, first, second))
        self.changed()

    def flush(self, *, scales: bool = True) -> None:
        """Sends what is to be done. Without `scales`, a last scaling is left to the step."""
        rounds: list[dict[tuple[str, float, float], list[Place]]] = []
        for place, slot in self._slots.items():
            edits, slot.edits = slot.edits, []
            if scales and slot.scale != 1.0:
                edits.append(("scale", slot.scale, 0.0))
                slot.scale = 1.0
            for index, edit in enumerate(edits):
                if index == len(rounds):
                    rounds.append({})
                rounds[index].setdefault(edit, []).append(place)
        messages = [_message(edit, tensor_sets(places)) for each in rounds for edit, places in each.items()]
        if messages:
            self._store.run.adapters.edit(messages)

    def scale_of(self, place: Place) -> float:
        """What a step has to multiply the gradient with."""
        return self._slots[place].scale

    def spent(self, places: Iterable[Place]) -> None:
        """A step has taken these, scaled."""
        for place in places:
            slot = self._slots[place]
            slot.is_spent, slot.passed_over = True, 0
        self.changed()

    def warn_of_untaken(self, taken: set[Place]) -> None:
        """An optimizer has stepped and has taken these. Warns, once, of gradients that no optimizer takes."""
        if self._has_warned:
            return
        untaken = []
        for place in self._live():
            slot = self._slots[place]
            if place in taken or slot.is_spent:
                slot.passed_over = 0
            elif slot.is_fresh:  # else the step is perhaps another model's
                slot.passed_over += 1
                if slot.passed_over == _STEPS_UNTAKEN:
                    untaken.append(str(place))
            slot.is_fresh = False
        if untaken:
            self._has_warned = True
            warnings.warn(
                f"gradients of {len(untaken)} expert parameters were left by the last {_STEPS_UNTAKEN} optimizer steps: "
                f"{', '.join(untaken[:_NAMED])}{', ...' if len(untaken) > _NAMED else ''}. If they are to train, make "
                "the optimizer after the adapter and give it these parameters; if not, freeze them with requires_grad_(False)",
                stacklevel=2,
            )

    def kept(self, taken: set[Place]) -> list[TensorSet]:
        """Gradients that a step leaves to others."""
        left = [place for place in self._held() if place not in taken and not self._slots[place].is_spent]
        return tensor_sets(left)

    # Norms

    def norm(self, gradient: GradientSource, order: float) -> float:
        """Of the gradient averaged over the ranks."""
        self.require_live(gradient)
        if order not in self._norms:
            self.flush(scales=False)
            self._norms[order] = self._ask_norms(order, self._held())
        if gradient.matrix.place not in self._norms[order]:  # one that .grad does not have, on several ranks
            self._norms[order] |= self._ask_norms(order, [gradient.matrix.place])
        norm = self._norms[order][gradient.matrix.place]
        return norm if order == 0.0 else norm * abs(self._slot(gradient).scale)

    def _ask_norms(self, order: float, places: list[Place]) -> dict[Place, float]:
        sets = tensor_sets(places)
        _, norms = self._store.run.adapters.norms(sets, order)
        named = ((each.adapter, layer, name) for each in sets for layer in each.layers for name in tensor_names(each.tensors))
        found = dict(zip(named, norms, strict=True))
        return {place: _joined([found[place.adapter, place.layer, name] for name in place.tensors], order) for place in places}

    def _held(self) -> list[Place]:
        """Where anything stands for the gradient. What is held by a rank is its own affair: ranks have to ask for the same."""
        if self._store.world_size > 1:
            return self._live()
        return [place for place, slot in self._slots.items() if slot.is_held()]

    def _live(self) -> list[Place]:
        """Where a parameter's .grad is one."""
        found = []
        for place, slot in self._slots.items():
            parameter = slot.parameter()
            gradient = None if parameter is None else gradient_of(parameter.grad)
            if gradient is not None and gradient.generation == slot.generation:
                found.append(place)
        return found

    def _slot(self, gradient: GradientSource) -> _Slot:
        return self._slots[gradient.matrix.place]


def tensor_sets(places: Iterable[Place]) -> list[TensorSet]:
    """Their tensors, as few sets as they make."""
    bits: dict[tuple[str, int], int] = {}
    for place in places:
        bits[place.adapter, place.layer] = bits.get((place.adapter, place.layer), 0) | place.bits
    layers: dict[tuple[str, int], list[int]] = {}
    for (adapter, layer), tensors in bits.items():
        layers.setdefault((adapter, tensors), []).append(layer)
    return [TensorSet(adapter, tensors, tuple(sorted(each))) for (adapter, tensors), each in layers.items()]


def handle(gradient: GradientSource, like: torch.Tensor) -> RemoteTensor:
    """The gradient as a tensor."""
    made: RemoteTensor = RemoteTensor(Stored(gradient), like)
    return made


def _joined(norms: list[float], order: float) -> float:
    """The norm of tensors that have these norms."""
    if any(map(math.isnan, norms)):
        return math.nan
    if math.isinf(order):
        return max(norms) if order > 0 else min(norms)
    if order == 0.0:
        return sum(norms)
    return norms[0] if len(norms) == 1 else float(sum(norm**order for norm in norms) ** (1.0 / order))


def _message(edit: tuple[str, float, float], sets: list[TensorSet]) -> pb.GradientEdit:
    what, first, second = edit
    messages = [each.to_proto() for each in sets]
    if what == "scale":
        return pb.GradientEdit(sets=messages, scale=first)
    if what == "zero":
        return pb.GradientEdit(sets=messages, zero=True)
    least = None if first == -math.inf else first
    return pb.GradientEdit(sets=messages, clamp=pb.Clamp(least=least, most=None if second == math.inf else second))
