"""An adapter: LoRA of some layers of the base model with what an optimizer keeps of it."""

from __future__ import annotations

from dataclasses import dataclass

import kt_expert_native as native
import numpy as np
from kt_expert_proto.lora import LayerLora

from kt_expert_server.errors import InvalidRequest, NotFound, WrongPhase
from kt_expert_server.model.loader import BaseModel

OPTIMIZER_KINDS = ("adamw", "sgd", "adafactor")  # whose states exist; adam's is adamw's
_INITIALISED = ("a_gate", "a_up", "a_down")
_TENSORS_PER_LAYER = 4  # seeds are apart by this; a multiple of what is initialised


def native_lora(lora: LayerLora) -> native.LoraSpec:
    """Raises native.InvalidArgument for ranks, scales or a dropout that make no sense."""
    return native.LoraSpec(
        tied=lora.tied,
        rank_gate=lora.rank_gate,
        rank_up=lora.rank_up,
        rank_down=lora.rank_down,
        scale_gate=lora.scale_gate,
        scale_up=lora.scale_up,
        scale_down=lora.scale_down,
        dropout=lora.dropout,
    )


@dataclass(slots=True)
class AdapterLayer:
    """fp32 master parameters and the optimizer's state of one layer. The state exists from the first step on."""

    layer_spec: native.LayerSpec
    spec: native.LoraSpec
    parameters: native.LoraTensors
    state: native.OptimizerState | None = None


class Adapter:
    """Zero when made. Changed only by work of the engine, so never while another piece of work reads it."""

    def __init__(self, model: BaseModel, lora: tuple[LayerLora, ...], moment_dtype: str) -> None:
        self.moment_dtype = moment_dtype
        self.version = 0  # counts changes of parameters; a ticket of an older version is stale
        self.layers: dict[int, AdapterLayer] = {}
        for entry in lora:
            layer_spec, spec = model.layers[entry.layer].spec, native_lora(entry)
            self.layers[entry.layer] = AdapterLayer(layer_spec, spec, native.LoraTensors(layer_spec, spec))

    def initialise(self, seed: int) -> None:
        """A uniform in +-1/sqrt(fan_in), the bound of PEFT's kaiming_uniform(a=sqrt(5)); B zero. Seeded per tensor."""
        for index, layer in self.layers.items():
            for position, name in enumerate(_INITIALISED):
                if name not in layer.parameters.names():
                    continue
                tensor = layer.parameters.tensor(name)
                generator = np.random.Generator(np.random.Philox(key=[seed, index * _TENSORS_PER_LAYER + position]))
                bound = tensor.shape[2] ** -0.5
                tensor[...] = generator.uniform(-bound, bound, tensor.shape).astype(np.float32)

    def layer(self, index: int) -> AdapterLayer:
        """Raises NotFound where the adapter does not reach that layer."""
        found = self.layers.get(index)
        if found is None:
            raise NotFound(f"the run has no LoRA on layer {index}; it has on {sorted(self.layers)}")
        return found

    def ensure_state(self, layer: AdapterLayer, kind: str) -> native.OptimizerState:
        """The layer's optimizer state; one of another kind is replaced."""
        if layer.state is not None and layer.state.kind != kind:
            layer.state = None  # before the new one is made: only one is reserved
        if layer.state is None:
            layer.state = native.OptimizerState(layer.layer_spec, layer.spec, kind, self.moment_dtype)
        return layer.state

    def require_kind(self, layer: AdapterLayer, kind: str, steps: int) -> None:
        """Raises WrongPhase where a layer has taken updates of another kind."""
        if layer.state is not None and layer.state.kind != kind and _has_updates(layer.state):
            raise WrongPhase(
                f"the run has taken {steps} steps with {layer.state.kind} and is asked for {kind}; say that "
                "the optimizer is new (Step.new_optimizer) to forget its moments"
            )

    def drop_moments(self) -> None:
        """Of every layer, of those too that saw no gradient in this window. They are freed before new ones are made: only
        one set is reserved, and a step that then lacks memory is asked for again with the same words."""
        for layer in self.layers.values():
            layer.state = None

    @property
    def optimizer(self) -> str:
        """The kind whose state it holds; empty before the first step."""
        states = [layer.state for layer in self.layers.values()]  # a step may replace them meanwhile
        return next((state.kind for state in states if state is not None), "")

    @property
    def nbytes(self) -> int:
        return sum(layer.parameters.nbytes for layer in self.layers.values())


def check_lora(model: BaseModel, lora: tuple[LayerLora, ...]) -> None:
    """Raises NotFound for a layer without experts, InvalidRequest for settings without a meaning."""
    seen: set[int] = set()
    for entry in lora:
        model.require_layer(entry.layer)
        if entry.layer in seen:
            raise InvalidRequest(f"layer {entry.layer} has two LoRA entries, expected one")
        seen.add(entry.layer)
        try:
            native_lora(entry)
        except native.InvalidArgument as error:
            raise InvalidRequest(f"layer {entry.layer}: {error}") from error


def parameter_bytes(model: BaseModel, lora: LayerLora) -> int:
    """fp32 bytes of one set of tensors of one layer."""
    spec = model.layers[lora.layer].plan
    hidden, inter = spec.hidden_size, spec.intermediate_size
    a_up = 0 if lora.tied else lora.rank_up * hidden
    floats = lora.rank_gate * (hidden + inter) + a_up + lora.rank_up * inter + lora.rank_down * (inter + hidden)
    return spec.num_experts * floats * 4


def optimizer_bytes(model: BaseModel, lora: LayerLora, moment_dtype: str) -> int:
    """Of the largest state an optimizer may need for one layer."""
    spec, ranks = model.layers[lora.layer].spec, native_lora(lora)
    return max(native.OptimizerState.bytes_of(spec, ranks, kind, moment_dtype) for kind in OPTIMIZER_KINDS)


def step_bytes(model: BaseModel, lora: LayerLora, ranks: int, threads: int) -> int:
    """Scratch of a step over one layer."""
    spec = model.layers[lora.layer].spec
    return max(native.Engine.step_bytes(spec, native_lora(lora), kind, ranks, threads) for kind in OPTIMIZER_KINDS)


def _has_updates(state: native.OptimizerState) -> bool:
    return any(state.tensor("step", name).any() for name in state.names())
