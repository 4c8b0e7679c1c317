"""Reading and replacing the tensors of a run's adapter, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kt_expert_server.errors import InvalidRequest, NotFound
from kt_expert_server.model.bf16 import bf16_to_fp32, round_to_bf16
from kt_expert_server.model.loader import BaseModel
from kt_expert_server.runtime.compute import ensure_state
from kt_expert_server.runtime.run import LayerAdapter, Run

# What an optimizer keeps, by the kind whose state it is.
SLOTS = {"exp_avg": "adamw", "exp_avg_sq": "adamw", "momentum_buffer": "sgd", "row_var": "adafactor", "col_var": "adafactor"}
STEP = "step"  # how many updates the moments of a tensor stand for
PARTS = ("parameter", *SLOTS, STEP)
_MOST_STEPS = 2**24  # up to here fp32 counts exactly


@dataclass(frozen=True, slots=True)
class TensorId:
    """One tensor of a run: part is parameter, a slot of the optimizer's state, or step."""

    layer: int
    tensor: str
    part: str


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """Memory of a run as fp32 [E, rows, columns], whatever it is held in."""

    memory: NDArray[np.float32] | NDArray[np.uint16]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.memory.shape

    @property
    def nbytes(self) -> int:
        """Of the fp32 form."""
        return self.memory.size * 4

    def read(self) -> NDArray[np.float32]:
        """A view where the memory is fp32, else a copy."""
        if self.memory.dtype == np.float32:
            return self.memory.view(np.float32)
        return bf16_to_fp32(self.memory.view(np.uint16))

    @property
    def copy_bytes(self) -> int:
        """What a copy of the fp32 form takes at its peak."""
        return self.nbytes * (1 if self.memory.dtype == np.float32 else 2)

    def write(self, values: NDArray[np.float32]) -> None:
        """Rounds to nearest where the memory is bf16."""
        if self.memory.dtype == np.float32:
            self.memory[...] = values
        else:
            self.memory[...] = round_to_bf16(values)


def stored_tensors(run: Run, parameters: bool, moments: bool) -> Iterator[tuple[TensorId, LiveTensor]]:
    """Tensors in layer order; what counts the updates of a tensor comes after its moments."""
    for layer, adapter in sorted(run.adapters.items()):
        for name in adapter.parameters.names() if parameters else ():
            yield TensorId(layer, name, "parameter"), LiveTensor(adapter.parameters.tensor(name))
        state = adapter.state if moments else None
        if state is not None:
            for slot in state.slots():
                for name in state.names():
                    yield TensorId(layer, name, slot), LiveTensor(state.tensor(slot, name))


def adapter_of(run: Run, layer: int) -> LayerAdapter:
    """Raises NotFound, for a run too that was closed meanwhile."""
    adapter = run.adapters.get(layer)
    if adapter is None:
        raise NotFound(f"run {run.name!r} has no LoRA on layer {layer}, or was closed")
    return adapter


def shape_in(run: Run, tensor: TensorId) -> tuple[int, ...]:
    """[E, rows, columns] of a tensor, whether the run has moments of that kind yet or not. Raises NotFound."""
    adapter = adapter_of(run, tensor.layer)
    if tensor.tensor not in adapter.parameters.names():
        raise NotFound(f"layer {tensor.layer} has LoRA tensors {adapter.parameters.names()}, not {tensor.tensor!r}")
    experts, rows, columns = adapter.parameters.tensor(tensor.tensor).shape
    factored = {"row_var": (experts, rows, 1), "col_var": (experts, 1, columns), STEP: (1, 1, 1)}
    return factored.get(tensor.part, (experts, rows, columns))


class AdapterWriter:
    """Replaces tensors of a run. Pieces of one tensor come in order; finish() refuses a tensor left half-written.

    The pieces are collected per tensor and copied when it is complete, so a broken upload changes no tensor in part.
    Moments are replaced under a hold on the run's step barrier, which is the caller's.
    """

    def __init__(self, run: Run, model: BaseModel) -> None:
        self._run = run
        self._model = model
        self._current: TensorId | None = None
        self._shape: tuple[int, ...] = ()
        self._buffer = bytearray()
        self.tensors = 0

    def write(self, tensor: TensorId, shape: tuple[int, ...], offset: int, data: bytes, step: int) -> None:
        """One piece; `step` is what moments without a count of their own stand for."""
        if tensor != self._current:
            self.finish()
            expected = shape_in(self._run, tensor)
            if shape != expected:
                raise InvalidRequest(f"{tensor} has shape {shape}, expected {expected}")
            self._current, self._shape, self._buffer = tensor, shape, bytearray()
        if offset != len(self._buffer) or offset + len(data) > self._size:
            raise InvalidRequest(
                f"{tensor}: a piece of {len(data)} bytes at {offset} came, expected to go on at {len(self._buffer)} of "
                f"{self._size}"
            )
        self._buffer += data
        if len(self._buffer) == self._size:
            values = np.frombuffer(bytes(self._buffer), np.float32).reshape(self._shape)
            require_meaning(tensor, values)
            self.replace(tensor, values, step)
            self._run.adapter_version += 1  # from here on, tickets of the old values are stale
            self._buffer = bytearray()
            self._current = None
            self.tensors += 1

    @property
    def _size(self) -> int:
        """Bytes of the current tensor."""
        return math.prod(self._shape) * np.dtype(np.float32).itemsize

    def replace(self, tensor: TensorId, values: NDArray[np.float32], step: int) -> None:
        """A whole tensor that has been checked. The count of a moment is `step` until one comes of its own. Raises
        InvalidRequest for a count without moments."""
        adapter = adapter_of(self._run, tensor.layer)
        if tensor.part == "parameter":
            LiveTensor(adapter.parameters.tensor(tensor.tensor)).write(values)
            return
        if tensor.part == STEP:
            if adapter.state is None:
                raise InvalidRequest(f"{tensor} came before the moments it counts; send those first")
            LiveTensor(adapter.state.tensor(STEP, tensor.tensor)).write(values)
            return
        kind = SLOTS[tensor.part]
        # What is put replaces what another optimizer kept.
        state = ensure_state(self._run, adapter, self._model.layers[tensor.layer].spec, kind)
        LiveTensor(state.tensor(tensor.part, tensor.tensor)).write(values)
        LiveTensor(state.tensor(STEP, tensor.tensor)).write(np.full((1, 1, 1), step, np.float32))

    def finish(self) -> None:
        """Raises InvalidRequest where the last tensor is incomplete."""
        if self._current is not None:
            raise InvalidRequest(f"{self._current} ended after {len(self._buffer)} of {self._size} bytes")


def require_meaning(tensor: TensorId, values: NDArray[np.float32]) -> None:
    """Raises InvalidRequest for values that are not finite, or for a count that is none."""
    if not np.isfinite(values).all():
        raise InvalidRequest(f"{tensor} holds values that are not finite")
    if tensor.part == STEP and not (0 <= values.item() <= _MOST_STEPS and values.item().is_integer()):
        raise InvalidRequest(f"{tensor} is {values.item()}, expected a whole number in [0, {_MOST_STEPS}]")
