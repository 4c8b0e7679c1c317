"""What a session is told at its beginning, and what its core asks of whoever drives it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kt_expert_proto.codec import Source
from kt_expert_proto.header import Header
from kt_expert_proto.v1 import service_pb2 as pb

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


@dataclass(frozen=True, slots=True)
class Note:
    """For the log."""

    text: str


Action = Connect | Disconnect | Send | Settled | Note
