"""What a session is told at its beginning, and what its core asks of whoever drives it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kt_expert_proto.codec import Buffer, Source
from kt_expert_proto.header import Header, Tensor
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1.session_pb2 import Join

from kt_expert_client.errors import KtExpertError
from kt_expert_client.session.calls import Call


class Phase(enum.Enum):
    APART = enum.auto()  # no connection; the next attempt is at connect_at
    JOINING = enum.auto()
    JOINED = enum.auto()
    ENDED = enum.auto()


@dataclass(frozen=True, slots=True)
class JoinTerms:
    """Which rank of which run this trainer is."""

    run: str
    config: pb.RunConfig
    ephemeral: bool
    rank: int
    instance: str  # drawn at random, once for each session
    takeover: bool = False

    def join(self, born: int, acknowledged: int, tickets: list[int], *, resume_only: bool) -> Join:
        """What a stream begins with. `born` is 0 for the first one: only that may take the rank from another trainer."""
        return Join(
            run=self.run,
            config=self.config,
            ephemeral=self.ephemeral,
            rank=self.rank,
            instance=self.instance,
            takeover=self.takeover and not born,
            acknowledged=acknowledged,
            tickets=tickets,
            resume_only=resume_only,
            born=born,
        )


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a transport; what was sent on an older one is not sent any more."""


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the transport. Its end is not reported to the core."""


@dataclass(frozen=True, slots=True)
class Send:
    header: Header
    payload: bytes | Source


@dataclass(frozen=True, slots=True)
class Settled:
    """A call has its outcome: results and head, or an error."""

    call: Call
    error: KtExpertError | None
    results: dict[Tensor, Buffer]


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    text: str


Action = Connect | Disconnect | Send | Settled | Note
