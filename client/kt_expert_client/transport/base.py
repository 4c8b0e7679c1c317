"""The contract of a transport: frames out in order, frames in in order, one clear end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kt_expert_client.errors import KtExpertError


class FrameReceiver(Protocol):
    """What a transport delivers to. Called from the transport's own thread, one call at a time."""

    def on_frame(self, message: bytes) -> None: ...

    def on_end(self, error: KtExpertError) -> None:
        """The transport is gone; nothing follows. Called exactly once."""


class Transport(Protocol):
    """Sends batches of frames in the order they were given."""

    def start(self, receiver: FrameReceiver) -> None:
        """Begins to deliver. Called once."""

    def send(self, frames: Iterable[bytes]) -> None:
        """Queues frames; the iterable is consumed on the transport's thread, so it may wait for a device copy."""

    def close(self) -> None:
        """Ends the transport. Safe to call twice."""
