"""A barrier over the members of a run, in numbered rounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kt_expert_server.errors import DeadlinePassed, WrongPhase

Payload = TypeVar("Payload")
Result = TypeVar("Result")


@dataclass
class _Round(Generic[Payload, Result]):
    sequence: int
    arrivals: dict[int, Payload] = field(default_factory=dict)
    done: asyncio.Future[Result] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Barrier(Generic[Payload, Result]):
    """Round n completes when all ranks have arrived with n; its action runs once and every rank gets the one result.

    A rank that asks for the last completed round again gets the stored result: a repeated call changes nothing.
    """

    def __init__(self, name: str, world_size: int, completed: int = 0) -> None:
        self._name = name
        self._world_size = world_size
        self._completed = completed
        self._last: Result | None = None
        self._round: _Round[Payload, Result] | None = None

    @property
    def completed(self) -> int:
        return self._completed

    def restart(self, completed: int) -> None:
        """Continues counting from another number, as after loading a checkpoint. Raises WrongPhase inside a round."""
        if self._round is not None:
            raise WrongPhase(f"{self._name} {self._round.sequence} is under way; wait for it")
        self._completed, self._last = completed, None

    async def arrive(
        self,
        rank: int,
        sequence: int,
        payload: Payload,
        timeout_s: float,
        action: Callable[[Mapping[int, Payload]], Awaitable[Result]],
    ) -> Result:
        """Raises DeadlinePassed that names the missing ranks, WrongPhase for a round that is not the next."""
        if sequence == self._completed and self._last is not None:
            return self._last
        if sequence != self._completed + 1:
            raise WrongPhase(
                f"{self._name} {sequence} was asked for, the next is {self._completed + 1}; a member has missed or repeated one"
            )
        if self._round is None:
            self._round = _Round(sequence)
        current = self._round
        current.arrivals[rank] = payload
        if len(current.arrivals) == self._world_size:
            await self._complete(current, action)
        return await self._wait(current, rank, timeout_s)

    async def _complete(
        self,
        current: _Round[Payload, Result],
        action: Callable[[Mapping[int, Payload]], Awaitable[Result]],
    ) -> None:
        try:
            result = await action(current.arrivals)
        except Exception as error:  # every waiting member must hear of it, whatever it is
            self._round = None
            current.done.set_exception(error)
            return
        self._completed, self._last, self._round = current.sequence, result, None
        current.done.set_result(result)

    async def _wait(self, current: _Round[Payload, Result], rank: int, timeout_s: float) -> Result:
        try:
            return await asyncio.wait_for(asyncio.shield(current.done), timeout_s)
        except TimeoutError:
            missing = sorted(set(range(self._world_size)) - set(current.arrivals))
            if self._round is current:
                current.arrivals.pop(rank, None)
                if not current.arrivals:
                    self._round = None
            raise DeadlinePassed(
                f"{self._name} {current.sequence} waited {timeout_s:g} s for ranks {missing} of {self._world_size}; "
                "nothing was applied. Are all members alive and at the same step?"
            ) from None
