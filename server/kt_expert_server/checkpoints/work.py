"""Checkpoints as work for the engine: copying a run's state, and putting one in its place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from kt_expert_proto.lora import STEP
from numpy.typing import NDArray

from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.adapters.tensor_sets import find_adapter
from kt_expert_server.adapters.transfer import TensorId, require_values, shape_of, write_tensor
from kt_expert_server.checkpoints.manifest import Manifest
from kt_expert_server.checkpoints.snapshot import Tensors, copy_tensors
from kt_expert_server.engine.work import Outcome, WholeWork
from kt_expert_server.errors import InvalidRequest, NotFound


class CopyWork(WholeWork):
    """Copies parameters and moments. The caller has reserved snapshot_bytes()."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        self._adapters = adapters
        self.tensors: Tensors = []

    def run(self) -> None:
        self.tensors = copy_tensors(self._adapters)

    def commit(self) -> Outcome:
        return Outcome()


class ApplyWork(WholeWork):
    """Replaces parameters and moments by a checkpoint's, all or none."""

    def __init__(self, adapters: Mapping[str, Adapter], run: str, manifest: Manifest, tensors: Tensors) -> None:
        super().__init__()
        self._adapters, self._run, self._manifest, self._tensors = adapters, run, manifest, tensors

    def run(self) -> None:
        # Everything is checked before the first write: a damaged checkpoint must leave the run as it was.
        ordered = sorted(self._tensors, key=lambda entry: entry[0].part == STEP)
        for tensor, values in ordered:
            self._check(tensor, values)
        for adapter in [find_adapter(self._adapters, record.name) for record in self._manifest.adapters]:
            adapter.drop_moments()  # a layer it has no moments of had taken no step then
        for tensor, values in ordered:
            write_tensor(self._adapters[tensor.adapter], tensor, values, self._manifest.step)
        for record in self._manifest.adapters:
            for layer in self._adapters[record.name].layers.values():
                layer.encode()

    def _check(self, tensor: TensorId, values: NDArray[np.float32]) -> None:
        """Raises InvalidRequest for a tensor the run does not have, of another shape, or with values that are not finite."""
        try:
            expected = shape_of(find_adapter(self._adapters, tensor.adapter), tensor)
        except NotFound as error:
            raise InvalidRequest(f"the checkpoint holds {tensor}, which run {self._run!r} does not have") from error
        if values.shape != expected or values.dtype != np.float32:
            raise InvalidRequest(f"{tensor} has shape {values.shape} and dtype {values.dtype}, expected {expected} and float32")
        require_values(tensor, values)

    def commit(self) -> Outcome:
        for record in self._manifest.adapters:
            self._adapters[record.name].touch()
        return Outcome()
