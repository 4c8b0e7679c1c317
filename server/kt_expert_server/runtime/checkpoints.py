"""Saving and loading runs while the server goes on serving others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kt_expert_server.errors import InvalidRequest, NotFound, WrongPhase
from kt_expert_server.runtime.adapter_io import STEP, AdapterWriter, TensorId, require_meaning, shape_in, stored_tensors
from kt_expert_server.runtime.compute import drop_moments
from kt_expert_server.runtime.engine_queue import EngineQueue
from kt_expert_server.runtime.memory import Kind
from kt_expert_server.runtime.observer import Observer
from kt_expert_server.runtime.registry import Registry
from kt_expert_server.runtime.run import LayerLora, Run
from kt_expert_server.store.checkpoint import CheckpointStore, Manifest

# Times the fp32 size of a layer, while its file is made: the bytes of every tensor and of the file; where moments are
# held in bf16, their fp32 values too and what one of them takes to be made.
_FORMS_OF_A_LAYER = {"fp32": 2, "bf16": 4}


class Report(Protocol):
    def __call__(self, done_bytes: int, total_bytes: int) -> None: ...


class Checkpoints:
    """Snapshots between two operations of the engine, so that what is written is one consistent state."""

    def __init__(self, registry: Registry, queue: EngineQueue, store: CheckpointStore | None, observer: Observer) -> None:
        self._registry = registry
        self._queue = queue
        self._store = store
        self._observer = observer

    def _require_store(self) -> CheckpointStore:
        if self._store is None:
            raise WrongPhase("this server has no place for checkpoints; start it with --state-dir DIR")
        return self._store

    async def save(self, run: Run, name: str, report: Report) -> str:
        """Returns the manifest's sha256."""
        store, digest = self._require_store(), self._registry.loaded_model().plan.digest
        begun = time.monotonic()
        async with self._queue.turn():
            needed = _FORMS_OF_A_LAYER[run.config.moment_dtype] * largest_layer_bytes(run)
            with self._registry.budget.held(Kind.REQUESTS, needed, f"saving checkpoint {name!r}"):
                result = await self._queue.run(lambda: store.save(run, name, digest, report))
        self._observer.checkpoint("save", time.monotonic() - begun)
        return result

    async def load(self, run: Run, name: str, report: Report) -> str:
        """Replaces adapter, moments and step of a run of the same configuration. Returns the model digest."""
        store, model = self._require_store(), self._registry.loaded_model()
        manifest = store.read_manifest(name)
        if manifest.model_digest != model.plan.digest:
            raise InvalidRequest(f"checkpoint {name!r} belongs to another base model than the one this server has loaded")
        require_same_lora(name, manifest.config.lora, run)
        begun = time.monotonic()

        def work() -> None:
            # Everything is read and checked before the first write: a damaged snapshot must leave the run as it was.
            tensors = sorted(store.tensors(name, manifest), key=lambda entry: entry[0].part == STEP)
            for tensor, values in tensors:
                check(run, tensor, values)
            drop_moments(run)  # a layer the snapshot has no moments of had taken no step then
            writer, done = AdapterWriter(run, model), 0
            for tensor, values in tensors:
                writer.replace(tensor, values, manifest.step)
                done += values.nbytes
                report(done, manifest.size_bytes)

        async with self._queue.turn():
            budget = self._registry.budget.held(Kind.REQUESTS, manifest.size_bytes, f"checkpoint {name!r}")
            with run.step_barrier.held(f"checkpoint {name!r} is being loaded"), budget:
                await self._queue.run(work)
                run.step_barrier.restart(manifest.step)
            run.adapter_version += 1
            for member in run.members.values():
                member.close_window()
        self._observer.checkpoint("load", time.monotonic() - begun)
        return manifest.model_digest

    def list(self) -> list[tuple[str, Manifest]]:
        store = self._require_store()
        return [(name, store.read_manifest(name)) for name in store.names()]


def check(run: Run, tensor: TensorId, values: NDArray[np.float32]) -> None:
    """Raises InvalidRequest for a tensor the run does not have, of another shape, or with values that are not finite."""
    try:
        expected = shape_in(run, tensor)
    except NotFound as error:
        raise InvalidRequest(f"the checkpoint holds {tensor}, which run {run.name!r} does not have") from error
    if values.shape != expected or values.dtype != np.float32:
        raise InvalidRequest(f"{tensor} has shape {values.shape} and dtype {values.dtype}, expected {expected} and float32")
    require_meaning(tensor, values)


def require_same_lora(name: str, stored: Sequence[LayerLora], run: Run) -> None:
    """Raises InvalidRequest for other layers, ranks or scales. Dropout leaves nothing in a snapshot."""
    ours, theirs = ({lora.layer: replace(lora, dropout=0.0) for lora in each} for each in (run.config.lora, stored))
    for layer in sorted(ours.keys() | theirs.keys()):
        if ours.get(layer) != theirs.get(layer):
            raise InvalidRequest(
                f"checkpoint {name!r} has other LoRA shapes than run {run.name!r}: layer {layer} has {theirs.get(layer)} "
                f"there and {ours.get(layer)} here"
            )


def largest_layer_bytes(run: Run) -> int:
    """fp32 bytes of all a snapshot holds of one layer."""
    sizes: dict[int, int] = {}
    for tensor, live in stored_tensors(run, parameters=True, moments=True):
        sizes[tensor.layer] = sizes.get(tensor.layer, 0) + live.nbytes
    return max(sizes.values(), default=0)
