"""The gradients of one member: what its backwards have added up, by adapter, layer and tensor."""

from __future__ import annotations

from collections.abc import Iterator

import kt_expert_native as native
from kt_expert_proto.lora import tensor_bits, tensor_names

from kt_expert_server.adapters.adapter import AdapterLayer


class GradientWindow:
    """Of one adapter. Sets of tensors are bits, as in the protocol. A tensor that is open has been added to since the last
    step; one that is there holds values that mean something, also after a step, until it is replaced."""

    def __init__(self) -> None:
        self._accumulators: dict[int, native.AdapterTensors] = {}
        self._open: dict[int, int] = {}
        self._there: dict[int, int] = {}

    @property
    def is_empty(self) -> bool:
        return not any(self._open.values())

    def open_layers(self) -> Iterator[tuple[int, int]]:
        """Layers with gradients since the last step, and which tensors have."""
        return ((layer, bits) for layer, bits in sorted(self._open.items()) if bits)

    def open(self, layer: int) -> int:
        return self._open.get(layer, 0)

    def there(self, layer: int) -> int:
        return self._there.get(layer, 0)

    def accumulator(self, index: int, layer: AdapterLayer) -> native.AdapterTensors:
        """Where a backward of this layer writes, made on first use. Nothing counts until `add`."""
        if index not in self._accumulators:
            self._accumulators[index] = native.AdapterTensors(layer.layer_spec, layer.spec)
        return self._accumulators[index]

    def add(self, layer: int, bits: int) -> None:
        """Those tensors of the layer's accumulator have been written."""
        self._open[layer] = self.open(layer) | bits
        self._there[layer] = self.there(layer) | bits

    def end(self, kept: dict[int, int]) -> None:
        """A step was taken: only what is kept goes on being added to."""
        self._open = {layer: bits & kept.get(layer, 0) for layer, bits in self._open.items()}

    def close(self) -> None:
        """What was added up so far no longer counts; its memory is reused."""
        self._open.clear()
        self._there.clear()

    def gradients(self, layer: int, bits: int) -> native.AdapterTensors | None:
        """Those tensors, zero where nothing was added to them; None where nothing was added to any."""
        there = self.there(layer) & bits
        if not there:
            return None
        accumulator = self._accumulators[layer]
        names = set(accumulator.names())
        for name in tensor_names(bits & ~there):
            if name in names:
                accumulator.tensor(name)[...] = 0.0
        return accumulator

    def forget_layer(self, layer: int) -> None:
        """It has other tensors now."""
        for held in (self._accumulators, self._open, self._there):
            held.pop(layer, None)


class Windows:
    """All gradients of a member, by the adapter's name."""

    def __init__(self) -> None:
        self._by_adapter: dict[str, GradientWindow] = {}

    def begin(self, adapter: str) -> GradientWindow:
        """That adapter's, made where there is none. On the core's thread only."""
        return self._by_adapter.setdefault(adapter, GradientWindow())

    def of(self, adapter: str) -> GradientWindow:
        """That adapter's; an empty one where none was begun."""
        return self._by_adapter.get(adapter) or GradientWindow()

    @property
    def is_empty(self) -> bool:
        return all(window.is_empty for window in self._by_adapter.values())

    def close(self, adapter: str = "") -> None:
        """Of one adapter, or of all."""
        for name, window in self._by_adapter.items():
            if adapter in ("", name):
                window.close()

    def end(self, kept: dict[str, dict[int, int]]) -> None:
        for name, window in self._by_adapter.items():
            window.end(kept.get(name, {}))

    def forget(self, adapter: str) -> None:
        """The adapter is gone."""
        self._by_adapter.pop(adapter, None)


def present_bits(layer: AdapterLayer) -> int:
    """The tensors an adapter has in a layer."""
    return tensor_bits(layer.parameters.names())
