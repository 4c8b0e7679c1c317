"""The contract of a transport on the server's side.

A transport moves frames, (header, payload) pairs, over one connection of one trainer. It knows nothing of what they mean.

* All calls, both ways, are made on the event loop's thread.
* It opens with driver.open_stream(), which gives it a number. From then on it passes what comes in, through a Decoder
  (kt_expert_proto/codec.py), to the driver's receiver for that number, in the order of the wire.
* A receive buffer is handed out by the receiver's `admit`, aligned and of the size the header announces, before a byte of
  the tensor is taken. A whole one is passed on with `deliver` and is then the core's; a half-filled one is released by
  Decoder.close().
* `send` queues a frame and returns. Frames leave in the order of the calls. A payload that is a buffer belongs to the core,
  which keeps it unchanged until the trainer has acknowledged it: the transport reads it when the frame's turn comes and
  never releases it. What is queued is bounded by the member's credits.
* An end comes once. From the peer or the network: the transport calls driver.close_stream(). From the core: `end` is called;
  with an error the transport drops what is queued, whose buffers are not the stream's any more, and tells the peer the error;
  without one it sends what was queued before. It delivers nothing more either way.
"""

from __future__ import annotations

from typing import Protocol

from kt_expert_proto.header import Header

from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.errors import ServerError


class Transport(Protocol):
    """One connection of one trainer."""

    def send(self, header: Header, payload: bytes | PooledBuffer) -> None: ...

    def end(self, error: ServerError | None) -> None: ...
