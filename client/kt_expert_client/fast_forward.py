"""Small forwards that keep nothing, past the session's state machine where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from kt_expert_client.session.calls import OutTensor
from kt_expert_client.session.driver import Pending, Session
from kt_expert_client.staging import Delivery, HostTensor
from kt_expert_client.wire.fast_path import FastCall


@dataclass(frozen=True, slots=True)
class FastForwards:
    """Those of one layer with the same adapters."""

    session: Session
    key: Hashable

    def learn(self, entry: int) -> None:
        """An ordinary forward's result has told the number that the next may be asked for by."""
        path = self.session.fast_path() if entry else None
        if path is not None:
            path.learn(self.key, entry)

    def begin(self, sent: Sequence[OutTensor]) -> FastCall | None:
        """None where it has to go the ordinary way."""
        path = self.session.fast_path()
        if path is None or not path.knows(self.key):
            return None
        return path.begin(self.key, sent[0].rows, [each.source.view() for each in sent])


class FastForward:
    """One under way. It is asked for the ordinary way where this one comes to nothing."""

    def __init__(self, call: FastCall, sent: Sequence[OutTensor], output: Delivery, ask: Callable[[], Pending]) -> None:
        """`ask` takes the tensors over."""
        self._call: FastCall | None = call
        self._sent, self._output, self._ask = sent, output, ask

    def result(self) -> torch.Tensor | None:
        """The output; None where there is none, and ordinary() is to be asked. To be called once."""
        call, self._call = self._call, None
        assert call is not None  # noqa: S101
        output = self._output.receive(call.finish)
        if output is not None:
            self._release()
        return output

    def ordinary(self) -> Pending:
        """The same forward, asked for the ordinary way."""
        self.drop(keep_tensors=True)
        return self._ask()

    def drop(self, *, keep_tensors: bool = False) -> None:
        """Nobody wants its output."""
        call, self._call = self._call, None
        if call is not None:
            call.drop()
        if not keep_tensors:
            self._release()

    def _release(self) -> None:
        for each in self._sent:
            cast("HostTensor", each.source).release()
