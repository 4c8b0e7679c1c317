"""The gradient window of one member: what its backwards have added up since the last step."""

from __future__ import annotations

import kt_expert_native as native

from kt_expert_server.adapters.adapter import AdapterLayer


class GradientWindow:
    """Accumulators by layer. One that is not in the open window holds values that no longer count."""

    def __init__(self) -> None:
        self._accumulators: dict[int, native.LoraTensors] = {}
        self._open: set[int] = set()

    @property
    def is_empty(self) -> bool:
        return not self._open

    def accumulator(self, index: int, layer: AdapterLayer) -> native.LoraTensors:
        """Where a backward of this layer writes, made on first use. Nothing counts until `add`."""
        if index not in self._accumulators:
            self._accumulators[index] = native.LoraTensors(layer.layer_spec, layer.spec)
        return self._accumulators[index]

    def counts(self, index: int) -> bool:
        """Whether the layer's accumulator belongs to the open window; else a backward replaces what it holds."""
        return index in self._open

    def add(self, index: int) -> None:
        """A backward has written the layer's accumulator."""
        self._open.add(index)

    def close(self) -> None:
        """What was added up so far no longer counts; its memory is reused."""
        self._open.clear()

    def gradients(self, index: int) -> native.LoraTensors | None:
        return self._accumulators[index] if index in self._open else None
