"""What the core asks of whoever drives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import kt_expert_native as native
from kt_expert_proto.header import Header

from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.engine.together import SharedPass
from kt_expert_server.engine.work import Work
from kt_expert_server.errors import ServerError


@dataclass(frozen=True, slots=True)
class Send:
    """A frame for a stream. A buffer is the core's: a transport that does not send it at once holds it."""

    stream: int
    header: Header
    payload: bytes | PooledBuffer


@dataclass(frozen=True, slots=True)
class EndStream:
    """After what was sent before. None: without an error. The core counts the stream as closed already."""

    stream: int
    error: ServerError | None


@dataclass(frozen=True, slots=True)
class StartWork:
    """For the engine's thread: work.run_part(part), then core.work_done(). There is one at a time."""

    work: Work | SharedPass
    part: int = 0


@dataclass(frozen=True, slots=True)
class StartDisk:
    """For the disk's thread, one after another: job(), then core.disk_done() with its result or error."""

    job_id: int
    job: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Retire:
    """Objects that nothing uses any more and whose memory takes time to give back: to be dropped on another thread."""

    tickets: tuple[native.Ticket, ...]


@dataclass(frozen=True, slots=True)
class Note:
    """For the log; level as in logging."""

    level: int
    text: str


Action = Send | EndStream | StartWork | StartDisk | Retire | Note
