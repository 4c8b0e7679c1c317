"""Which tensors of which adapters a step, a norm or an edit is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from kt_expert_proto.lora import ALL_TENSORS

from kt_expert_server.adapters.adapter import Adapter, AdapterLayer
from kt_expert_server.adapters.window import Windows, present_bits
from kt_expert_server.errors import InvalidRequest, NotFound


@dataclass(frozen=True, slots=True)
class TensorSet:
    """Bits of tensors in each of some layers; without layers, what has gradients."""

    adapter: str
    tensors: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerSet:
    """Tensors of one layer of an adapter that it has."""

    adapter: Adapter
    index: int
    layer: AdapterLayer
    bits: int


def find_adapter(adapters: Mapping[str, Adapter], name: str) -> Adapter:
    """Raises NotFound with what there is."""
    found = adapters.get(name)
    if found is None:
        raise NotFound(f"the run has no adapter {name!r}; it has: {', '.join(sorted(adapters)) or 'none'}")
    return found


def resolve(adapters: Mapping[str, Adapter], windows: Sequence[Windows], sets: Iterable[TensorSet]) -> Iterator[LayerSet]:
    """Layer by layer, in the order of the sets. Raises NotFound for an adapter, a layer or a tensor there is not."""
    for each in sets:
        adapter = find_adapter(adapters, each.adapter)
        wanted = each.tensors or ALL_TENSORS
        if not each.layers:
            yield from _with_gradients(adapter, windows, wanted)
            continue
        for index in each.layers:
            layer = adapter.layer(index)
            bits = wanted & present_bits(layer)
            if each.tensors and bits != each.tensors:
                raise NotFound(
                    f"adapter {adapter.name!r} has tensors {layer.parameters.names()} in layer {index}, asked for the set "
                    f"{each.tensors:#x}"
                )
            yield LayerSet(adapter, index, layer, bits)


def _with_gradients(adapter: Adapter, windows: Sequence[Windows], wanted: int) -> Iterator[LayerSet]:
    for index, layer in sorted(adapter.layers.items()):
        bits = 0
        for each in windows:
            bits |= each.of(adapter.name).open(index)
        if bits & wanted:
            yield LayerSet(adapter, index, layer, bits & wanted)


def kept_bits(adapters: Mapping[str, Adapter], windows: Windows, sets: Iterable[TensorSet]) -> dict[str, dict[int, int]]:
    """By adapter and layer."""
    found: dict[str, dict[int, int]] = {}
    for each in resolve(adapters, [windows], sets):
        layers = found.setdefault(each.adapter.name, {})
        layers[each.index] = layers.get(each.index, 0) | each.bits
    return found


def require_apart(sets: Iterable[TensorSet]) -> None:
    """Raises InvalidRequest where a tensor may be in two of them."""
    seen: list[TensorSet] = []
    for each in sets:
        for other in seen:
            layers = not each.layers or not other.layers or bool(set(each.layers) & set(other.layers))
            shared = (each.tensors or ALL_TENSORS) & (other.tensors or ALL_TENSORS)
            if each.adapter == other.adapter and layers and shared:
                raise InvalidRequest(f"a tensor of adapter {each.adapter!r} is in two groups of a step; name each once")
        seen.append(each)
