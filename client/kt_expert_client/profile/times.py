"""The times of one call at both ends, and the difference between the two clocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from kt_expert_proto.v1.session_pb2 import Timing


@dataclass(slots=True)
class Stamps:
    """Of a call that is on its way, in seconds of this process's monotonic clock."""

    thread: int  # the caller's
    asked: float  # it came
    step: int  # optimizer steps that the run had taken
    sent: float = 0.0  # its tensors were ready, and given to the transport
    settled: float = 0.0  # its outcome was here


@dataclass(frozen=True, slots=True)
class CallTimes:
    """One forward or backward. All times in seconds; `server` is in the server's clock, which is `offset_s` ahead."""

    op: str  # forward or backward
    layer: int
    tokens: int
    stamps: Stamps
    wanted: float  # the caller began to wait
    taken: float  # it had the result
    thread: int  # which that was
    server: Timing
    offset_s: float

    @property
    def parts(self) -> Parts:
        server, stamps, offset = self.server, self.stamps, self.offset_s
        return Parts(
            copy=stamps.sent - stamps.asked,
            send=max(0.0, server.complete - offset - stamps.sent),
            queue=server.begun - server.complete,
            compute=server.ended - server.begun,
            back=max(0.0, stamps.settled - (server.ended - offset)),
            hand_over=self.taken - max(stamps.settled, self.wanted),
            waited=max(0.0, stamps.settled - self.wanted),
            whole=max(stamps.settled, self.taken) - stamps.asked,
        )


@dataclass(frozen=True, slots=True)
class Parts:
    """What a call's time is made of, in seconds.

    copy: tensors brought to the host and into the wire's dtype. send: from there until all is on the server. queue: behind
    others' work. compute: by the engine, with what others had of it between a long batch's parts. back: from the outcome until
    it is here. hand_over: from then, or from when the caller wanted it, until it had the tensors. waited: how long the caller
    stood still for the outcome. whole: from the call to the result.
    """

    copy: float = 0.0
    send: float = 0.0
    queue: float = 0.0
    compute: float = 0.0
    back: float = 0.0
    hand_over: float = 0.0
    waited: float = 0.0
    whole: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        return Parts(*(getattr(self, name) + getattr(other, name) for name in PARTS))


PARTS = tuple(each.name for each in fields(Parts))


@dataclass(slots=True)
class ClockOffset:
    """How far the server's clock is ahead of this one, by the call that spent least time on the way: half of that is what it
    may be wrong by (RFC 5905, section 8)."""

    offset_s: float = 0.0
    least_way_s: float = field(default=float("inf"))

    def learn(self, sent: float, settled: float, server: Timing) -> None:
        way_s = (settled - sent) - (server.ended - server.received)
        if way_s < self.least_way_s:
            self.least_way_s = way_s
            self.offset_s = ((server.received - sent) + (server.ended - settled)) / 2


def share_of(stages_s: Mapping[str, float]) -> dict[str, float]:
    """Parts of one, largest first."""
    total = sum(stages_s.values())
    ordered = sorted(stages_s.items(), key=lambda entry: -entry[1])
    return {name: seconds / total for name, seconds in ordered} if total else {}
