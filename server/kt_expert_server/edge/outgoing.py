"""Frames that wait to be sent to a trainer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kt_expert_proto.codec import Memory, Outbound
from kt_expert_proto.header import FrameType, Header, Op
from kt_expert_proto.shared import Place
from kt_expert_proto.status import STATUS_NUMBERS
from kt_expert_proto.v1.session_pb2 import ErrorDetail

from kt_expert_server.edge.pace import Pace
from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.errors import OutOfCapacity

LAST_WORDS_S = 2.0  # for what was queued before an end to leave
_MAX_QUEUED_FRAMES = 4096  # a trainer that acknowledges has at most some dozens; about 1 MiB where tensors are not counted
# What a trainer that makes no mistake hardly gets; a request that it cancels is none of these.
_REFUSALS = {
    STATUS_NUMBERS[name] for name in ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED")
}  # fmt: skip


class Outgoing:
    """Frames that wait to be sent, an iterator over them. Their buffers are held until the encoder has done with them. `lend`
    gives the place of a buffer that the trainer sees, which is sent in its stead."""

    def __init__(
        self, pace: Pace, paced_as: str, lend: Callable[[PooledBuffer], Place | None] = lambda _: None
    ) -> None:  # fmt: skip
        self._pace, self._paced_as, self._lend = pace, paced_as, lend
        self.was_refused = False  # a request, since the reader last waited
        self._frames: deque[tuple[Header, bytes | PooledBuffer]] = deque()
        self._copying: PooledBuffer | None = None  # the encoder may still read it
        self._copied: list[PooledBuffer] = []

    def __len__(self) -> int:
        return len(self._frames)

    def say(self, header: Header, payload: bytes | PooledBuffer) -> OutOfCapacity | None:
        """Adds what the core says, and counts refusals in the trainer's pace. The error to end the stream with, where too many
        frames wait."""
        if len(self._frames) >= _MAX_QUEUED_FRAMES:
            return OutOfCapacity(f"{len(self._frames)} frames wait to be read by this trainer; read them as they come")
        if _is_refusal(header, payload):
            self._pace.charge(self._paced_as)
            self.was_refused = True
        self.add(header, payload)
        return None

    async def settle(self) -> None:
        """Returns when the trainer's refused requests are within its pace."""
        self.was_refused = False
        await self._pace.settle(self._paced_as)

    def __iter__(self) -> Outgoing:
        return self

    def __next__(self) -> Outbound:
        if self._copying is not None:
            self._copied.append(self._copying)
            self._copying = None
        if not self._frames:
            raise StopIteration
        header, payload = self._frames.popleft()
        if isinstance(payload, bytes):
            return header, payload
        self._copying = payload
        return header, self._lend(payload) or Memory(payload.view)

    def add(self, header: Header, payload: bytes | PooledBuffer) -> None:
        if not isinstance(payload, bytes):
            payload.hold()
        self._frames.append((header, payload))

    def first_pass(self) -> str | None:
        """The direction of the pass whose frame is the first, if it is one's."""
        op = self._frames[0][0].op if self._frames else Op.NONE
        return op.name.lower() if op in (Op.FORWARD, Op.BACKWARD) else None

    def release_copied(self) -> None:
        """To be called with each message that the encoder yields: before it is sent where that is a copy, and when it has been
        sent where it is not. Its trainer may acknowledge as soon as it has it."""
        for buffer in self._copied:
            buffer.release()
        self._copied.clear()

    def clear(self) -> None:
        """Nothing more is sent. The encoder must not go on."""
        for _, payload in self._frames:
            if not isinstance(payload, bytes):
                payload.release()
        self._frames.clear()
        if self._copying is not None:
            self._copied.append(self._copying)
            self._copying = None
        self.release_copied()


def _is_refusal(header: Header, payload: bytes | PooledBuffer) -> bool:
    """Whether a frame tells its trainer of a mistake."""
    if header.type is not FrameType.ERROR or not isinstance(payload, bytes):
        return False
    return ErrorDetail.FromString(payload).code in _REFUSALS
