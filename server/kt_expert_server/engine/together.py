"""Small passes of several members over one layer's weights, as one: reading the weights is what a small batch costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import kt_expert_native as native

from kt_expert_server.engine.passes import PassWork


class SharedPass:
    """Pieces of one part each, which have prepared and have their company in common. Each gets the bits it would get alone; one
    that fails, or is cancelled before it begins, takes no other with it."""

    parts = 1

    def __init__(self, engine: native.Engine, pieces: Sequence[PassWork]) -> None:
        self._engine = engine
        self.pieces = tuple(pieces)
        self.errors: dict[PassWork, Exception] = {}
        self.fault: Exception | None = None  # why they could not be computed together

    def run_part(self, part: int) -> None:
        """On the engine's thread. Raises nothing that is one piece's own."""
        left = [each for each in self.pieces if (token := each.token_of(part)) is None or not token.fired()]
        alone = [each for each in self.pieces if each not in left]
        try:
            tickets = self._compute(left)
        except Exception as error:  # nothing has changed: whose fault it is shows when each is computed alone
            self.fault = error
            left, tickets, alone = [], [], list(self.pieces)
        for each, ticket in zip(left, tickets, strict=True):  # from here on it counts: it must not be computed again
            each.together = len(left)
            each.add_stages(self._engine)
            self._try(each, lambda: each.take(part, ticket))  # noqa: B023  # called at once
        for each in alone:
            self._try(each, lambda: each.run_part(part))  # noqa: B023

    def _compute(self, pieces: Sequence[PassWork]) -> Sequence[native.Ticket | None]:
        if not pieces:
            return []
        arguments = [each.arguments(0, None) for each in pieces]
        if pieces[0].kind == "forward":
            return self._engine.forward_together(arguments)
        self._engine.backward_together(arguments)
        return [None] * len(pieces)

    def _try(self, piece: PassWork, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.errors[piece] = error
