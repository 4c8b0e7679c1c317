"""Reading and replacing the tensors of a run's adapter, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import kt_expert_native as native
import numpy as np
from numpy.typing import NDArray

from kt_expert_server.errors import InvalidRequest, NotFound, WrongPhase
from kt_expert_server.model.loader import BaseModel
from kt_expert_server.runtime.compute import ensure_moments
from kt_expert_server.runtime.run import Run

PARTS = ("parameter", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class TensorId:
    """One tensor of a run: part is parameter, exp_avg or exp_avg_sq."""

    layer: int
    tensor: str
    part: str


def stored_tensors(run: Run, parameters: bool, moments: bool) -> Iterator[tuple[TensorId, NDArray[np.float32]]]:
    """Tensors in layer order, as fp32 [E, rows, columns] views of the live memory."""
    wanted = (("parameter",) if parameters else ()) + (("exp_avg", "exp_avg_sq") if moments else ())
    for layer, adapter in sorted(run.adapters.items()):
        sets = {"parameter": adapter.parameters, "exp_avg": adapter.exp_avg, "exp_avg_sq": adapter.exp_avg_sq}
        for part in wanted:
            tensors = sets[part]
            if tensors is not None:
                for name in tensors.names():
                    yield TensorId(layer, name, part), tensors.tensor(name)


class AdapterWriter:
    """Replaces tensors of a run. Pieces of one tensor come in order; finish() refuses a tensor left half-written.

    The pieces are collected per tensor and copied when it is complete, so a broken upload changes no tensor in part.
    """

    def __init__(self, run: Run, model: BaseModel) -> None:
        self._run = run
        self._model = model
        self._current: TensorId | None = None
        self._buffer = bytearray()
        self._target: NDArray[np.float32] | None = None
        self.tensors = 0

    def write(self, tensor: TensorId, shape: tuple[int, ...], offset: int, data: bytes) -> None:
        if tensor != self._current:
            self.finish()
            self._current, self._target, self._buffer = tensor, self.locate(tensor), bytearray()
            if shape != self._target.shape:
                raise InvalidRequest(f"{tensor} has shape {shape}, expected {self._target.shape}")
        assert self._target is not None  # noqa: S101  # set together with _current
        if offset != len(self._buffer) or offset + len(data) > self._target.nbytes:
            raise InvalidRequest(
                f"{tensor}: a piece of {len(data)} bytes at {offset} came, expected to go on at {len(self._buffer)} of "
                f"{self._target.nbytes}"
            )
        self._buffer += data
        if len(self._buffer) == self._target.nbytes:
            values = np.frombuffer(bytes(self._buffer), np.float32).reshape(self._target.shape)
            require_finite(tensor, values)
            self._target[...] = values
            self._run.adapter_version += 1  # from here on, tickets of the old values are stale
            self._buffer = bytearray()
            self._current = None
            self.tensors += 1

    def finish(self) -> None:
        """Raises InvalidRequest where the last tensor is incomplete."""
        if self._current is not None and self._target is not None:
            raise InvalidRequest(f"{self._current} ended after {len(self._buffer)} of {self._target.nbytes} bytes")

    def locate(self, tensor: TensorId) -> NDArray[np.float32]:
        """The live memory of a tensor. Raises NotFound, or WrongPhase for moments while a step is under way."""
        adapter = self._run.adapters.get(tensor.layer)
        if adapter is None:
            raise NotFound(f"run {self._run.name!r} has no LoRA on layer {tensor.layer}")
        tensors: native.LoraTensors = adapter.parameters
        if tensor.part != "parameter":
            require_no_step(self._run)
            moments = ensure_moments(adapter, self._model.layers[tensor.layer].spec)
            tensors = moments[0] if tensor.part == "exp_avg" else moments[1]
        if tensor.tensor not in tensors.names():
            raise NotFound(f"layer {tensor.layer} has LoRA tensors {tensors.names()}, not {tensor.tensor!r}")
        return tensors.tensor(tensor.tensor)


def require_finite(tensor: TensorId, values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise InvalidRequest(f"{tensor} holds values that are not finite")


def require_no_step(run: Run) -> None:
    """Raises WrongPhase while a member waits at the step barrier."""
    if not run.step_barrier.is_idle:
        raise WrongPhase(f"a step of run {run.name!r} is under way; moments and step count cannot change now")


def set_step(run: Run, step: int) -> None:
    """Continues counting optimizer steps from `step`. Raises WrongPhase while a barrier is open."""
    run.step_barrier.restart(step)
