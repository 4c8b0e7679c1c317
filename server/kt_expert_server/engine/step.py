"""Gradient norm and optimizer step over all members of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import kt_expert_native as native
from kt_expert_proto.v1.session_pb2 import ResultHead

from kt_expert_server.adapters.adapter import Adapter, AdapterLayer
from kt_expert_server.adapters.step_params import StepParams, agreed_params
from kt_expert_server.adapters.window import GradientWindow
from kt_expert_server.engine.work import Outcome, Work

LayerGradients = tuple[AdapterLayer, list[native.LoraTensors]]  # gradients in rank order


def collected(adapter: Adapter, windows: Sequence[GradientWindow]) -> list[LayerGradients]:
    """Layers that saw a backward in this window. `windows` are in rank order."""
    found: list[LayerGradients] = []
    for index, layer in adapter.layers.items():
        gradients = [window.gradients(index) for window in windows]
        present = [each for each in gradients if each is not None]
        if present:
            found.append((layer, present))
    return found


class NormWork(Work):
    """L2 norm over all layers of the gradients averaged over the world size."""

    def __init__(self, engine: native.Engine, adapter: Adapter, windows: Sequence[GradientWindow], world_size: int) -> None:
        super().__init__()
        self._engine, self._adapter, self._windows = engine, adapter, windows
        self._scale = 1.0 / world_size
        self._norm = 0.0

    def run(self) -> None:
        layers = collected(self._adapter, self._windows)
        squares = (self._engine.gradient_norms(2.0, self._scale, gradients) for _, gradients in layers)
        self._norm = sum(sum(of_layer.values()) for of_layer in squares) ** 0.5

    def commit(self) -> Outcome:
        return Outcome(ResultHead(norm=self._norm))


class StepWork(Work):
    """Averages, scales and applies the optimizer once, then closes every member's window."""

    kind = "step"

    def __init__(
        self,
        engine: native.Engine,
        adapter: Adapter,
        windows: Sequence[GradientWindow],
        by_rank: Mapping[int, StepParams],
        steps_taken: int,
        world_size: int,
    ) -> None:
        super().__init__()
        self._engine, self._adapter, self._windows = engine, adapter, windows
        self._by_rank, self._steps_taken, self._world_size = by_rank, steps_taken, world_size
        self._params: StepParams | None = None

    def prepare(self) -> None:
        """Raises InvalidRequest where members ask for different steps."""
        self._params = agreed_params(self._by_rank)

    def run(self) -> None:
        # All memory first: from the first update on nothing may fail. A layer that saw no backward is not here; it keeps its
        # parameters and moments, as torch does for a parameter without a gradient.
        params, adapter = self._params, self._adapter
        assert params is not None  # noqa: S101
        scale = params.grad_scale / self._world_size
        step = native.LayerStep({tensor: (update, scale) for tensor, update in params.updates().items()})
        layers = collected(adapter, self._windows)
        if not params.new_optimizer:
            for layer, _ in layers:
                adapter.require_kind(layer, params.state_kind, self._steps_taken)
        else:
            adapter.drop_moments()
        states = [adapter.ensure_state(layer, params.state_kind) for layer, _ in layers]
        updates = [(step, gradients, layer.parameters, state) for (layer, gradients), state in zip(layers, states, strict=True)]
        self._engine.step(updates)

    def commit(self) -> Outcome:
        self._adapter.version += 1
        for window in self._windows:
            window.close()
        return Outcome(ResultHead())
