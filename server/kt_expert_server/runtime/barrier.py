"""A barrier over the members of a run, in numbered rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kt_expert_server.errors import DeadlinePassed, ServerError, WrongPhase

Payload = TypeVar("Payload")
Result = TypeVar("Result")
Action = Callable[[Mapping[int, Payload]], Awaitable[Result]]


@dataclass(eq=False)
class _Arrival(Generic[Payload]):
    """One call of one rank; compared by identity, so that a call only ever takes itself back."""

    payload: Payload


@dataclass(eq=False)
class _Round(Generic[Payload, Result]):
    sequence: int
    arrivals: dict[int, _Arrival[Payload]] = field(default_factory=dict)
    done: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    action: asyncio.Task[None] | None = None  # set once all have arrived; from then on the round cannot be left


class Barrier(Generic[Payload, Result]):
    """Round n completes when all ranks have arrived with n; its action runs once and every rank gets the one result.

    The action runs in a task of its own: a caller that is cancelled or runs out of time does not stop or repeat it. A rank
    that asks for the last completed round again gets the stored result.
    """

    def __init__(self, name: str, world_size: int, completed: int = 0) -> None:
        self._name = name
        self._world_size = world_size
        self._completed = completed
        self._last: Result | None = None
        self._round: _Round[Payload, Result] | None = None
        self._held_for = ""

    @property
    def completed(self) -> int:
        return self._completed

    @contextmanager
    def held(self, why: str) -> Iterator[None]:
        """No round begins in the block. Raises WrongPhase where one is under way, or another block."""
        if self._round is not None:
            raise WrongPhase(f"{self._name} {self._round.sequence} is under way; wait for it")
        if self._held_for:
            raise WrongPhase(f"{self._held_for} already; wait for it")
        self._held_for = why
        try:
            yield
        finally:
            self._held_for = ""

    def restart(self, completed: int) -> None:
        """Continues counting from another number, as after loading a checkpoint; inside held()."""
        self._completed, self._last = completed, None

    def withdraw(self, rank: int) -> None:
        """The rank is gone: it no longer counts as arrived, unless the action runs already."""
        current = self._round
        if current is not None and current.action is None:
            current.arrivals.pop(rank, None)
            self._forget_if_empty(current)

    def abort(self, error: ServerError) -> None:
        """Every waiting rank gets the error, unless the action runs already."""
        current = self._round
        if current is not None and current.action is None:
            self._round = None
            current.done.set_exception(error)

    async def arrive(
        self, rank: int, sequence: int, payload: Payload, timeout_s: float, action: Action[Payload, Result]
    ) -> Result:
        """Raises DeadlinePassed that names the missing ranks, WrongPhase for a round that is not the next."""
        if sequence == self._completed and self._last is not None:
            return self._last
        if sequence != self._completed + 1:
            raise WrongPhase(
                f"{self._name} {sequence} was asked for, the next is {self._completed + 1}; a member has missed or repeated one"
            )
        if self._held_for:
            raise WrongPhase(f"{self._name} {sequence} came while {self._held_for}; ask for it again afterwards")
        current, arrival = self._join(rank, sequence, payload)
        if current.action is None and len(current.arrivals) == self._world_size:
            said = {each: given.payload for each, given in current.arrivals.items()}
            current.action = asyncio.get_running_loop().create_task(self._complete(current, said, action))
        return await self._wait(current, rank, arrival, timeout_s)

    def _join(self, rank: int, sequence: int, payload: Payload) -> tuple[_Round[Payload, Result], _Arrival[Payload]]:
        if self._round is None:
            self._round = _Round(sequence)
            # A round that all callers have given up on must not complain that nobody looked at its error.
            self._round.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        arrival = _Arrival(payload)
        if self._round.action is None:
            self._round.arrivals[rank] = arrival
        return self._round, arrival

    async def _complete(
        self, current: _Round[Payload, Result], said: Mapping[int, Payload], action: Action[Payload, Result]
    ) -> None:
        try:
            result = await action(said)
        except Exception as error:  # every waiting member must hear of it, whatever it is
            self._round = None
            current.done.set_exception(error)
            return
        self._completed, self._last, self._round = current.sequence, result, None
        current.done.set_result(result)

    async def _wait(self, current: _Round[Payload, Result], rank: int, arrival: _Arrival[Payload], timeout_s: float) -> Result:
        try:
            return await asyncio.wait_for(asyncio.shield(current.done), timeout_s)
        except TimeoutError:
            if current.action is not None:
                raise DeadlinePassed(
                    f"{self._name} {current.sequence}: all ranks have arrived and it is still running after {timeout_s:g} s; "
                    "ask for it again to get its result"
                ) from None
            missing = sorted(set(range(self._world_size)) - set(current.arrivals))
            raise DeadlinePassed(
                f"{self._name} {current.sequence} waited {timeout_s:g} s for ranks {missing} of {self._world_size}; "
                "nothing was applied. Are all members alive and at the same step?"
            ) from None
        finally:
            if current.action is None and current.arrivals.get(rank) is arrival:
                del current.arrivals[rank]
                self._forget_if_empty(current)

    def _forget_if_empty(self, current: _Round[Payload, Result]) -> None:
        if not current.arrivals and self._round is current:
            self._round = None
