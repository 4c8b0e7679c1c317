"""The contract of a transport on the trainer's side.

A transport moves frames, (header, payload) pairs, over one connection to the server. It knows nothing of what they mean, and it
is used once: after its end the session opens another.

* `send` may be called from any thread, takes frames that belong together, and returns soon. Frames leave in the order of the
  calls; those that only tell the server what it need not keep (QUIET) may wait MAX_QUIET_S for others to travel with. A payload
  that is a source is asked for its bytes when its turn comes; it may then wait for a copy from a device. The session keeps the
  source unchanged until the outcome of its request has come, and never longer than that for the transport's sake: what a closed
  transport still holds is not sent any more.
* What comes in is passed on from the transport's reader thread, one call at a time, in the order of the wire: `admit` before
  a byte of a tensor is taken, which hands out the buffer, then `deliver` with the whole tensor, which is the session's from
  then on. A half-filled buffer is released by the transport.
* `on_end` is called exactly once, from any thread, when nothing follows any more: after `close`, after an error of the
  connection, or when the server has ended the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kt_expert_proto.codec import Buffer, Outbound
from kt_expert_proto.header import FrameType, Header

from kt_expert_client.errors import KtExpertError
from kt_expert_client.wire.fast_path import FastPath

QUIET = (FrameType.ACK, FrameType.RELEASE)
MAX_QUIET_S = 0.001  # far below what a call takes, and long enough for the next one of a model's forward


def is_quiet(frames: Sequence[Outbound]) -> bool:
    return all(header.type in QUIET for header, _ in frames)


class Receiver(Protocol):
    """What a transport delivers to."""

    def admit(self, header: Header, offered: Buffer | None = None) -> Buffer | None:
        """`offered` has the tensor already."""

    def deliver(self, header: Header, payload: bytes | Buffer) -> None: ...

    def on_end(self, error: KtExpertError) -> None:
        """Why it ended. An error of the server's own has its message."""


class Transport(Protocol):
    """One connection."""

    @property
    def fast_path(self) -> FastPath | None:
        """For small forwards that keep nothing, where the connection has one."""

    def send(self, frames: Sequence[Outbound]) -> None: ...

    def close(self) -> None:
        """Safe to call twice, and from within a receiver's method."""


class Opener(Protocol):
    """Opens transports to one server."""

    def __call__(self, receiver: Receiver) -> Transport:
        """Begins to connect and returns at once; a failure comes as the receiver's `on_end`."""
