"""Routing that is recorded in one pass and played again in another: which experts each token took, layer by layer, with what
weights. For reinforcement learning, where training has to take the experts that the rollout took.

A replayed pass sends the recorded ids and weights, so that its outputs are those of the recorded one where everything else is.
The router goes on learning: a weight of an expert that it chooses now as well has the gradient of the weight that it gives it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kt_expert_client.errors import InvalidRequest, WrongPhase

_NO_PASS = -1  # of autograd


@dataclass(frozen=True, eq=False, slots=True)
class Routes:
    """Of one layer in one pass: expert ids [T, k], integer, and routing weights fp32 [T, k], on the CPU."""

    ids: torch.Tensor
    weights: torch.Tensor


@dataclass(eq=False, slots=True)
class Routing:
    """What was recorded: by layer, one entry for each pass, in order."""

    layers: dict[int, list[Routes]] = field(default_factory=dict)

    def add(self, layer: int, expert_ids: torch.Tensor, routing_weights: torch.Tensor) -> None:
        """Copies."""
        routes = Routes(expert_ids.detach().to("cpu", copy=True), routing_weights.detach().to("cpu", torch.float32, copy=True))
        self.layers.setdefault(layer, []).append(routes)

    def joined(self) -> Routing:
        """All passes of each layer as one, their tokens behind each other: a rollout's prompt and its decoded tokens, of one
        sequence, as one pass of training sees them. Raises InvalidRequest where nothing was recorded."""
        if not self.layers:
            raise InvalidRequest("no pass of a model with experts on a server was recorded")
        return Routing({
            layer: [Routes(torch.cat([each.ids for each in passes]), torch.cat([each.weights for each in passes]))]
            for layer, passes in self.layers.items()
        })  # fmt: skip

    def save(self, path: Path | str) -> None:
        """As safetensors: `layer.pass.ids` and `layer.pass.weights`."""
        tensors = {
            f"{layer}.{number}.{name}": tensor.contiguous()
            for layer, passes in self.layers.items()
            for number, routes in enumerate(passes)
            for name, tensor in (("ids", routes.ids), ("weights", routes.weights))
        }
        save_file(tensors, path)

    @staticmethod
    def load(path: Path | str) -> Routing:
        """What save() wrote. Raises InvalidRequest for another file."""
        tensors = load_file(path)
        passes: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            parts = key.split(".")
            if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()) or parts[2] not in ("ids", "weights"):
                raise InvalidRequest(f"{path} has a tensor {key}; expected LAYER.PASS.ids and LAYER.PASS.weights")
            passes.setdefault((int(parts[0]), int(parts[1])), {})[parts[2]] = tensor
        return Routing(_by_layer(path, passes))


def _by_layer(path: Path | str, passes: Mapping[tuple[int, int], Mapping[str, torch.Tensor]]) -> dict[int, list[Routes]]:
    layers: dict[int, list[Routes]] = {}
    for (layer, number), tensors in sorted(passes.items()):
        known = layers.setdefault(layer, [])
        if set(tensors) != {"ids", "weights"} or tensors["ids"].shape != tensors["weights"].shape or number != len(known):
            raise InvalidRequest(f"{path} lacks ids or weights of pass {len(known)} of layer {layer}, or they differ in shape")
        known.append(Routes(tensors["ids"], tensors["weights"]))
    return layers


class _Player:
    """Gives out what was recorded, pass by pass. A pass that a backward makes again, for checkpointing, gets the routes of the
    first: the last pass of a layer is made again first."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._next: dict[int, int] = {}
        self._given: dict[int, list[Routes]] = {}  # to passes that may be made again
        self.owed = 0  # passes that will be made again, and were not

    def routes(self, layer: int, expert_ids: torch.Tensor) -> Routes:
        given = self._given.setdefault(layer, [])
        if _is_in_backward():
            if not given:
                raise WrongPhase(f"a pass of layer {layer} is made again that was not replayed")
            self.owed = max(0, self.owed - 1)
            return given.pop()
        passes, number = self._routing.layers.get(layer, []), self._next.get(layer, 0)
        if number >= len(passes):
            raise WrongPhase(f"pass {number + 1} of layer {layer} is to be replayed, and {len(passes)} were recorded")
        routes = passes[number]
        if routes.ids.shape != expert_ids.shape:
            raise InvalidRequest(
                f"pass {number + 1} of layer {layer} was recorded with [T, k] = {list(routes.ids.shape)}, and has "
                f"{list(expert_ids.shape)} now"
            )
        self._next[layer] = number + 1
        given.append(routes)
        self.owed += _is_checkpointed()
        return routes


class _Process:
    """Of the whole process: a device's backward runs on a thread of torch's own."""

    def __init__(self) -> None:
        self.recording: Routing | None = None
        self.player: _Player | None = None


_PROCESS = _Process()


@contextlib.contextmanager
def record_routing() -> Iterator[Routing]:
    """Every pass of this process through experts on a server is recorded, but for those that checkpointing makes again. Raises
    WrongPhase inside another recording."""
    if _PROCESS.recording is not None:
        raise WrongPhase("routing is being recorded already")
    _PROCESS.recording = routing = Routing()
    try:
        yield routing
    finally:
        _PROCESS.recording = None


@contextlib.contextmanager
def replay_routing(routing: Routing) -> Iterator[None]:
    """Every pass of this process through experts on a server takes the next recorded one's routes. A backward under
    checkpointing makes passes again, and has to run inside.

    Raises InvalidRequest, in the pass, where the recorded one had another number of tokens or of routes; WrongPhase where there
    is none, inside another replay, and at the end where such a backward is still to come."""
    if _PROCESS.player is not None:
        raise WrongPhase("routing is being replayed already")
    _PROCESS.player = player = _Player(routing)
    try:
        yield
    finally:
        _PROCESS.player = None
    if player.owed:
        raise WrongPhase(
            f"{player.owed} replayed passes are under checkpointing and were not made again; call backward inside "
            "replay_routing"
        )


def routed(layer: int, expert_ids: torch.Tensor, routing_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The routes a pass takes: the router's, or recorded ones. Records them, where that is asked for."""
    player, recorded = _PROCESS.player, _PROCESS.recording
    if player is not None:
        expert_ids, routing_weights = _replayed(player.routes(layer, expert_ids), expert_ids, routing_weights)
    if recorded is not None and not _is_in_backward():
        recorded.add(layer, expert_ids, routing_weights)
    return expert_ids, routing_weights


def _is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != _NO_PASS


def _is_checkpointed() -> bool:
    """Whether this pass will be made again by checkpointing that is not reentrant."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and "checkpoint" in getattr(hooks[0], "__qualname__", "")


def _replayed(
    routes: Routes, expert_ids: torch.Tensor, routing_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    ids = routes.ids.to(expert_ids.device, expert_ids.dtype)
    weights = routes.weights.to(routing_weights.device, routing_weights.dtype)
    if not (torch.is_grad_enabled() and routing_weights.requires_grad):
        return ids, weights
    matches = ids.unsqueeze(-1) == expert_ids.unsqueeze(-2)  # [T, k recorded, k now]
    now = torch.where(matches, routing_weights.unsqueeze(-2), 0).sum(dim=-1)
    return ids, weights + (now - now.detach())  # recorded values, the router's gradient
