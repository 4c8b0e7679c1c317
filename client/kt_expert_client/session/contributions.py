"""Which settled backwards the gradients on the server are made of."""

from __future__ import annotations

from collections.abc import Iterable

from kt_expert_proto.lora import ALL_TENSORS, DEFAULT_ADAPTER, GRADIENT, PART_NUMBERS, tensor_bits
from kt_expert_proto.v1 import service_pb2 as pb

from kt_expert_client.session.calls import Call

Place = tuple[str, int]  # an adapter and a layer, or
ALL_LAYERS = -1


class Contributions:
    """By request id: the tensors, as bits, of an adapter and a layer that a request has added to or changed in place, and that
    no later one replaced."""

    def __init__(self) -> None:
        self._by_place: dict[Place, dict[int, int]] = {}

    @property
    def is_empty(self) -> bool:
        return not any(self._by_place.values())

    def added(self, call: Call) -> list[int]:
        """A backward has settled. Returns the requests that add to nothing any more: perhaps itself."""
        emptied: set[int] = set()
        for target in call.opened.backward.targets:
            place = (target.adapter, call.layer)
            emptied |= self._replace(place, target.replaced)
            if target.wanted:
                self._by_place.setdefault(place, {})[call.request_id] = target.wanted
        return self._unused(emptied | {call.request_id})

    def written(self, call: Call) -> None:
        """A tensor was written; it may be a gradient."""
        name = call.opened.write_tensor
        if name.part == PART_NUMBERS[GRADIENT]:
            place = (name.adapter or DEFAULT_ADAPTER, call.layer)
            self._by_place.setdefault(place, {})[call.request_id] = tensor_bits([name.tensor])

    def edited(self, call: Call) -> list[int]:
        """Gradients were changed in place: it is part of what they are made of. Returns the requests that add to nothing any
        more, where some were set to zero."""
        emptied: set[int] = set()
        for edit in call.opened.edit_gradients.edits:
            for each in edit.sets:
                bits = each.tensors or ALL_TENSORS
                of_adapter = [layer for adapter, layer in self._by_place if adapter == each.adapter]
                for layer in each.layers or of_adapter:
                    if edit.zero:
                        emptied |= self._replace((each.adapter, layer), bits)
                    requests = self._by_place.setdefault((each.adapter, layer), {})
                    requests[call.request_id] = requests.get(call.request_id, 0) | bits
        return self._unused(emptied)

    def stepped(self, kept: Iterable[pb.TensorSet]) -> None:
        """A step has taken them all, but those that are kept."""
        bits: dict[Place, int] = {}
        for each in kept:
            for layer in each.layers:
                place = (each.adapter, layer)
                bits[place] = bits.get(place, 0) | (each.tensors or ALL_TENSORS)
        for place in list(self._by_place):
            self._replace(place, ALL_TENSORS & ~bits.get(place, 0))

    def zeroed(self, adapter: str) -> list[int]:
        """Of one adapter, or without a name of all. Returns the requests that add to nothing any more."""
        emptied: set[int] = set()
        for place in list(self._by_place):
            if adapter in ("", place[0]):
                emptied |= self._replace(place, ALL_TENSORS)
        return self._unused(emptied)

    def _replace(self, place: Place, bits: int) -> set[int]:
        emptied: set[int] = set()
        requests = self._by_place.get(place, {})
        for request_id in list(requests):
            requests[request_id] &= ~bits
            if not requests[request_id]:
                del requests[request_id]
                emptied.add(request_id)
        if not requests:
            self._by_place.pop(place, None)
        return emptied

    def _unused(self, requests: set[int]) -> list[int]:
        used = {request_id for place in self._by_place.values() for request_id in place}
        return sorted(requests - used)
