"""How a fault is planted into the product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

Plant = Callable[[ExitStack], None]


@dataclass(frozen=True)
class Canary:
    name: str
    plant: Plant
    budget: int = 600  # seeds it may take to be caught


def patched(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Plant:
    """`wrap` gets the original and gives what stands in its place."""

    def plant(stack: ExitStack) -> None:
        stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))

    return plant


def nothing(owner: Any, name: str, result: object = None) -> Plant:
    return patched(owner, name, lambda _: lambda *_args, **_kwargs: result)


@contextmanager
def planted(canary: Canary) -> Iterator[None]:
    with ExitStack() as stack:
        canary.plant(stack)
        yield
