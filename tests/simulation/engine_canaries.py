"""Faults planted into passes and into the memory that both ends see."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import kt_expert_native as native
from kt_expert_proto.shared import Allocator
from kt_expert_server.edge.same_host.memory import SharedTensors
from kt_expert_server.engine.backward import BackwardWork
from kt_expert_server.engine.passes import ForwardWork
from kt_expert_server.engine.together import SharedPass

from simulation.planting import Canary, patched


def _window_closed_early(original: Any) -> Any:
    def prepare(self: BackwardWork) -> None:
        original(self)
        for target in self._targets:
            window = self._trained.windows.of(target.adapter)
            window._there[self._header.layer] = window.there(self._header.layer) & ~target.replaced
            window._open[self._header.layer] = window.open(self._header.layer) & ~target.replaced

    return prepare


def _gradients_pile_up(original: Any) -> Any:
    def into(self: BackwardWork, used: Any, target: Any) -> Any:
        return replace(original(self, used, target), replaced=[])

    return into


def _cancelled_half_way(_: Any) -> Any:
    def token(self: BackwardWork, part: int) -> Any:
        del part
        return self.token

    return token


def _last_part_left_out(original: Any) -> Any:
    def run(self: ForwardWork, part: int) -> None:
        if not part or part + 1 < self.parts:
            original(self, part)

    return run


def _tickets_mixed_up(original: Any) -> Any:
    return lambda self, pieces: list(reversed(original(self, pieces)))


def _computed_twice(original: Any) -> Any:
    """What was computed together is computed alone once more."""

    def compute(self: SharedPass, pieces: Any) -> Any:
        original(self, pieces)
        if len(pieces) > 1:
            raise native.InvalidArgument("planted")
        return [None] * len(pieces)

    return compute


def _first_one_s_error(original: Any) -> Any:
    """One piece's failure is everybody's."""

    def run(self: SharedPass, part: int) -> None:
        original(self, part)
        for error in list(self.errors.values())[:1]:
            self.errors = dict.fromkeys(self.pieces, error)

    return run


def _used_while_read(original: Any) -> Any:
    """A place serves again although its reader has not given it back."""

    def reuse(self: Allocator, offset: int) -> None:
        if not self._used[offset].is_owned:
            self._used[offset].generation = 0
        original(self, offset)

    return reuse


def _plant_given_back_early(stack: ExitStack) -> None:
    """A tensor's place goes back to the trainer before the server has computed from it."""

    def show(original: Any) -> Any:
        def shown(self: SharedTensors, header: Any, place: Any, offer: Any) -> Any:
            taken = original(self, header, place, offer)
            self._on_free(place)
            return taken

        return shown

    patched(SharedTensors, "show", show)(stack)
    patched(SharedTensors, "_returned", lambda _: lambda self, place: self._borrower.release(place))(stack)


def _lent_wherever_it_lies(_: Any) -> Any:
    """An outcome of an older connection is shown at its place there."""

    def lend(self: SharedTensors, buffer: Any) -> Any:
        if not hasattr(buffer, "offset"):
            return None
        used = self._allocator._used.get(buffer.offset)
        if used is None:
            self._allocator.take(len(buffer.view))
        return self._allocator.lend(buffer.offset) if buffer.offset in self._allocator._used else None

    return lend


ENGINE_CANARIES = (
    Canary("a backward closes the window before it can fail", patched(BackwardWork, "prepare", _window_closed_early)),
    Canary("gradients of an older window are added to", patched(BackwardWork, "_gradients_of", _gradients_pile_up)),
    Canary("a backward is cancelled between its parts", patched(BackwardWork, "token_of", _cancelled_half_way)),
    Canary("batches computed together get one another's tickets", patched(SharedPass, "_compute", _tickets_mixed_up)),
    Canary("what was computed together counts twice", patched(SharedPass, "_compute", _computed_twice)),
    Canary("one batch's failure is its company's", patched(SharedPass, "run_part", _first_one_s_error)),
    Canary("a place in shared memory serves again while it is read", patched(Allocator, "_reuse", _used_while_read)),
    Canary("a place in shared memory goes back too early", _plant_given_back_early),
    Canary("an outcome is shown in another connection's memory", patched(SharedTensors, "lend", _lent_wherever_it_lies)),
    Canary("a part of a pass is left out", patched(ForwardWork, "run_part", _last_part_left_out)),
)  # fmt: skip
