"""An adapter: LoRA of some layers of the base model, or their weights, with what an optimizer keeps of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import kt_expert_native as native
import numpy as np
from kt_expert_proto.lora import LayerLora

from kt_expert_server.errors import AlreadyExists, NotFound, WrongPhase
from kt_expert_server.model.loader import BaseModel

TRAINED_FORMAT = "bf16"  # of weights that are trained: whatever the base model's, they begin at its values and can follow
_INITIALISED = ("a_gate", "a_up", "a_down")
_TENSORS_PER_LAYER = 4  # seeds are apart by this; a multiple of what is initialised


def native_lora(lora: LayerLora) -> native.AdapterSpec:
    """Raises native.InvalidArgument for ranks, scales or a dropout that make no sense."""
    return native.AdapterSpec(
        tied=lora.tied,
        rank_gate=lora.rank_gate,
        rank_up=lora.rank_up,
        rank_down=lora.rank_down,
        scale_gate=lora.scale_gate,
        scale_up=lora.scale_up,
        scale_down=lora.scale_down,
        dropout=lora.dropout,
        full=lora.full,
    )


@dataclass(frozen=True, eq=False, slots=True)
class TrainedWeights:
    """What passes use of a layer's weights that are trained."""

    engine: native.Engine
    weights: native.LayerWeights


@dataclass(eq=False, slots=True)
class AdapterLayer:
    """fp32 master parameters and the optimizer's state of one layer. The state exists from the first step on."""

    lora: LayerLora
    layer_spec: native.LayerSpec
    spec: native.AdapterSpec
    parameters: native.AdapterTensors
    state: native.OptimizerState | None = None
    version: int = 0  # counts changes of parameters; a ticket of an older version is stale
    trained: TrainedWeights | None = None  # where the layer is trained in full

    @classmethod
    def make(cls, model: BaseModel, lora: LayerLora, engine: native.Engine) -> AdapterLayer:
        """LoRA that is zero, or the base model's weights. Encode them once they have their values."""
        base, spec = model.layers[lora.layer], native_lora(lora)
        made = cls(lora, base.spec, spec, native.AdapterTensors(base.spec, spec))
        if lora.full:
            made.trained = TrainedWeights(engine, base.weights.empty_like(TRAINED_FORMAT))
            engine.decode_weights(base.weights, made.parameters)
        return made

    def encode(self, first_expert: int = 0, experts: int | None = None) -> None:
        """Parameters that are weights have other values: passes use them from now on."""
        if self.trained is not None:
            count = self.layer_spec.num_experts - first_expert if experts is None else experts
            self.trained.engine.encode_weights(self.parameters, first_expert, count, self.trained.weights)

    def copy_parameters(self, other: AdapterLayer) -> None:
        """Of those tensors that both have."""
        own = self.parameters.names()
        for name in other.parameters.names():
            if name in own:
                self.parameters.tensor(name)[...] = other.parameters.tensor(name)

    def initialise(self, seed: int) -> None:
        """A uniform in +-1/sqrt(fan_in), the bound of PEFT's kaiming_uniform(a=sqrt(5)); B stays zero. Seeded per tensor."""
        for position, name in enumerate(_INITIALISED):
            if name not in self.parameters.names():
                continue
            tensor = self.parameters.tensor(name)
            generator = np.random.Generator(np.random.Philox(key=[seed, self.lora.layer * _TENSORS_PER_LAYER + position]))
            bound = tensor.shape[2] ** -0.5
            tensor[...] = generator.uniform(-bound, bound, tensor.shape).astype(np.float32)

    def require_kind(self, kind: str, forgotten: Iterable[str]) -> None:
        """Raises WrongPhase where tensors whose moments are not forgotten have taken updates of another kind."""
        state = self.state
        if state is None or state.kind == kind:
            return
        kept = [name for name in state.names() if name not in forgotten and state.tensor("step", name).any()]
        if kept:
            raise WrongPhase(
                f"layer {self.lora.layer} has taken steps with {state.kind} ({', '.join(kept)}) and is asked for {kind}; say "
                "that the optimizer is new (new_optimizer) to forget its moments"
            )

    def ensure_state(self, kind: str, moment_dtype: str) -> native.OptimizerState:
        """The layer's optimizer state; one of another kind is replaced."""
        if self.state is not None and self.state.kind != kind:
            self.state = None  # before the new one is made: only one is reserved
        if self.state is None:
            self.state = native.OptimizerState(self.layer_spec, self.spec, kind, moment_dtype)
        return self.state

    def forget_moments(self, names: Iterable[str]) -> None:
        """Those tensors begin anew."""
        if self.state is None:
            return
        forgotten = set(names) & set(self.state.names())
        if forgotten == set(self.state.names()):
            self.state = None
            return
        for name in forgotten:
            for slot in self.state.slots():
                self.state.tensor(slot, name)[...] = 0


class Held(Protocol):
    """Memory that is reserved."""

    def release(self) -> None: ...


class Adapter:
    """Changed only by work of the engine, so never while another piece of work reads it."""

    def __init__(self, name: str, moment_dtype: str, maker: str = "") -> None:
        self.name = name
        self.maker = maker  # the trainer's instance
        self.moment_dtype = moment_dtype
        self.layers: dict[int, AdapterLayer] = {}
        self.held: list[Held] = []  # its memory
        self.is_trained = False  # memory for its gradients, moments and steps is reserved too

    @property
    def lora(self) -> tuple[LayerLora, ...]:
        """Its layers, in order."""
        return tuple(self.layers[index].lora for index in sorted(self.layers))

    def layer(self, index: int) -> AdapterLayer:
        """Raises NotFound where the adapter does not reach that layer."""
        found = self.layers.get(index)
        if found is None:
            raise NotFound(f"adapter {self.name!r} does not reach layer {index}; it has layers {sorted(self.layers)}")
        return found

    def missing(self, asked: Iterable[LayerLora]) -> list[LayerLora]:
        """Layers as they have to become for all that is asked for to be there; those that are not to change are left out.
        Raises AlreadyExists for other ranks than those a projection has."""
        changed = []
        for lora in asked:
            existing = self.layers.get(lora.layer)
            made = lora if existing is None else _joined(self.name, existing.lora, lora)
            if existing is None or made != existing.lora:
                changed.append(made)
        return changed

    def drop_moments(self) -> None:
        for layer in self.layers.values():
            layer.state = None

    def touch(self) -> None:
        """All parameters have other values."""
        for layer in self.layers.values():
            layer.version += 1

    def release(self) -> None:
        """Gives its memory's reservations back. Safe to call twice."""
        for each in self.held:
            each.release()

    @property
    def optimizer(self) -> str:
        """The kind whose state it holds; empty before the first step."""
        states = [layer.state for layer in self.layers.values()]  # a step may replace them meanwhile
        return next((state.kind for state in states if state is not None), "")

    @property
    def nbytes(self) -> int:
        return sum(layer.parameters.nbytes for layer in self.layers.values())


def _joined(adapter: str, existing: LayerLora, asked: LayerLora) -> LayerLora:
    """Projections of both; those that both name must be the same."""
    made = existing
    if existing.full != asked.full:
        raise _other(adapter, existing, asked)
    if asked.rank_gate or asked.rank_up:
        ours = (existing.tied, existing.rank_gate, existing.rank_up, existing.scale_gate, existing.scale_up)
        theirs = (asked.tied, asked.rank_gate, asked.rank_up, asked.scale_gate, asked.scale_up)
        if (existing.rank_gate or existing.rank_up) and ours != theirs:
            raise _other(adapter, existing, asked)
        made = replace(
            made, tied=asked.tied, rank_gate=asked.rank_gate, rank_up=asked.rank_up, scale_gate=asked.scale_gate,
            scale_up=asked.scale_up,
        )  # fmt: skip
    if asked.rank_down:
        if existing.rank_down and (existing.rank_down, existing.scale_down) != (asked.rank_down, asked.scale_down):
            raise _other(adapter, existing, asked)
        made = replace(made, rank_down=asked.rank_down, scale_down=asked.scale_down)
    if existing.dropout != asked.dropout:
        raise _other(adapter, existing, asked)
    return made


def _other(adapter: str, existing: LayerLora, asked: LayerLora) -> AlreadyExists:
    return AlreadyExists(
        f"adapter {adapter!r} has {existing} and is asked for {asked}; choose another name for the adapter, or delete it first"
    )
