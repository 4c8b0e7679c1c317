"""Reading and replacing the tensors of an adapter, whole or some experts of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import kt_expert_native as native
import numpy as np
from kt_expert_proto.lora import PARAMETER, SLOTS, STEP
from numpy.typing import NDArray

from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.errors import InvalidRequest, NotFound
from kt_expert_server.model.bf16 import bf16_to_fp32, round_to_bf16
from kt_expert_server.model.loader import LoadedLayer

_MOST_STEPS = 2**24  # up to here fp32 counts exactly
_FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class TensorId:
    """One tensor of an adapter, or some experts of it: part is parameter, gradient, a slot of the optimizer's state, step, or
    base for the base model's own."""

    adapter: str
    layer: int
    tensor: str
    part: str
    first_expert: int = 0
    experts: int = 0  # 0: all from the first on

    def of(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """The part's shape, from the whole's. Raises InvalidRequest for experts there are not."""
        count = self.experts or shape[0] - self.first_expert
        if count < 1 or self.first_expert + count > shape[0]:
            raise InvalidRequest(f"{self} is asked for, and there are {shape[0]} experts")
        return count, shape[1], shape[2]

    def of_memory(self, memory: NDArray[Any]) -> NDArray[Any]:
        return memory[self.first_expert : self.first_expert + (self.experts or memory.shape[0])]


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """Memory of an adapter as fp32 [E, rows, columns], whatever it is held in."""

    memory: NDArray[np.float32] | NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.memory.shape

    @property
    def nbytes(self) -> int:
        """Of the fp32 form."""
        return self.memory.size * _FP32_BYTES

    def read(self) -> NDArray[np.float32]:
        """A view where the memory is fp32, else a copy."""
        if self.memory.dtype == np.float32:
            return self.memory.view(np.float32)
        return bf16_to_fp32(self.memory.view(np.uint16))

    def copy(self) -> NDArray[np.float32]:
        """The fp32 form in memory of its own."""
        values = self.read()
        return values.copy() if values.base is not None else values

    def write(self, values: NDArray[np.float32]) -> None:
        """Rounds to nearest where the memory is bf16."""
        if self.memory.dtype == np.float32:
            self.memory[...] = values
        else:
            self.memory[...] = round_to_bf16(values)


def all_tensors(
    adapters: Mapping[str, Adapter], *, parameters: bool, moments: bool
) -> Iterator[tuple[TensorId, LiveTensor]]:  # fmt: skip
    """Of all adapters, by name."""
    for _, adapter in sorted(adapters.items()):
        yield from stored_tensors(adapter, parameters=parameters, moments=moments)


def stored_tensors(adapter: Adapter, *, parameters: bool, moments: bool) -> Iterator[tuple[TensorId, LiveTensor]]:
    """Tensors in layer order; what counts the updates of a tensor comes after its moments."""
    for index, layer in sorted(adapter.layers.items()):
        for name in layer.parameters.names() if parameters else ():
            yield TensorId(adapter.name, index, name, PARAMETER), LiveTensor(layer.parameters.tensor(name))
        state = layer.state if moments else None
        if state is not None:
            for slot in state.slots():
                for name in state.names():
                    yield TensorId(adapter.name, index, name, slot), LiveTensor(state.tensor(slot, name))


def find_tensor(adapter: Adapter, tensor: TensorId) -> LiveTensor:
    """Raises NotFound for a tensor the adapter does not have, or not yet."""
    require_tensor(adapter, tensor)
    layer = adapter.layer(tensor.layer)
    if tensor.part == PARAMETER:
        return LiveTensor(tensor.of_memory(layer.parameters.tensor(tensor.tensor)))
    if layer.state is None or tensor.part not in layer.state.slots():
        held = "none" if layer.state is None else ", ".join(layer.state.slots())
        raise NotFound(f"layer {tensor.layer} has no {tensor.part} of {tensor.tensor}; its optimizer keeps: {held}")
    return LiveTensor(tensor.of_memory(layer.state.tensor(tensor.part, tensor.tensor)))


def require_tensor(adapter: Adapter, tensor: TensorId) -> None:
    """Raises NotFound for a layer or a name there is not."""
    names = adapter.layer(tensor.layer).parameters.names()
    if tensor.tensor not in names:
        raise NotFound(f"layer {tensor.layer} of adapter {adapter.name!r} has tensors {names}, not {tensor.tensor!r}")


def shape_of(adapter: Adapter, tensor: TensorId) -> tuple[int, int, int]:
    """[E, rows, columns] of a tensor, whether the adapter has moments of that kind yet or not. Raises NotFound."""
    require_tensor(adapter, tensor)
    experts, rows, columns = adapter.layer(tensor.layer).parameters.tensor(tensor.tensor).shape
    factored = {"row_var": (experts, rows, 1), "col_var": (experts, 1, columns), STEP: (1, 1, 1)}
    return tensor.of(factored.get(tensor.part, (experts, rows, columns)))


def base_shape(layer: LoadedLayer, tensor: TensorId) -> tuple[int, int, int]:
    """[E, rows, columns] of the base model's weights. Raises NotFound for what the layer does not have."""
    try:
        shape = native.AdapterTensors.shape_of(layer.spec, native.AdapterSpec(full=True), tensor.tensor)
    except native.InvalidArgument as error:
        raise NotFound(str(error)) from error
    if not shape[1]:
        raise NotFound(f"layer {tensor.layer} of the base model has no {tensor.tensor}")
    return tensor.of(shape)


def read_base(layer: LoadedLayer, tensor: TensorId, into: NDArray[np.float32]) -> None:
    """The base model's values, as passes use them. `into` has base_shape()."""
    kind, projection = tensor.tensor.split("_")
    for index in range(into.shape[0]):
        expert = tensor.first_expert + index
        into[index] = (
            layer.weights.bias(projection, expert) if kind == "bias" else layer.weights.dequantized(projection, expert)
        )


def require_values(tensor: TensorId, values: NDArray[np.float32]) -> None:
    """Raises InvalidRequest for values that are not finite, or for a count that is none."""
    if not np.isfinite(values).all():
        raise InvalidRequest(f"{tensor} holds values that are not finite")
    if tensor.part == STEP and not (0 <= values.item() <= _MOST_STEPS and values.item().is_integer()):
        raise InvalidRequest(f"{tensor} is {values.item()}, expected a whole number in [0, {_MOST_STEPS}]")


def write_tensor(adapter: Adapter, tensor: TensorId, values: NDArray[np.float32], step: int) -> None:
    """Replaces a tensor; encode the layer afterwards where it is a parameter. `values` have shape_of() and passed
    require_values(). The count of a moment is `step` until one comes of its own. Raises InvalidRequest for a count without
    moments."""
    layer = adapter.layer(tensor.layer)
    if tensor.part == PARAMETER:
        LiveTensor(tensor.of_memory(layer.parameters.tensor(tensor.tensor))).write(values)
    elif tensor.part == STEP:
        if layer.state is None:
            raise InvalidRequest(f"{tensor} came before the moments it counts; send those first")
        LiveTensor(layer.state.tensor(STEP, tensor.tensor)).write(values)
    else:
        # What is written replaces what another optimizer kept.
        state = layer.ensure_state(SLOTS[tensor.part], adapter.moment_dtype)
        LiveTensor(tensor.of_memory(state.tensor(tensor.part, tensor.tensor))).write(values)
        LiveTensor(state.tensor(STEP, tensor.tensor)).write(np.full((1, 1, 1), step, np.float32))
