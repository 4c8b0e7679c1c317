"""One request of a trainer, from the call to its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kt_expert_proto.codec import Buffer, Source
from kt_expert_proto.dtypes import ITEM_BYTES, Dtype
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.v1.session_pb2 import RequestOpen, ResultHead

from kt_expert_client.errors import KtExpertError
from kt_expert_client.profile.times import Stamps

# What the state of a run depends on: sent again where the server has lost it. A forward counts if it keeps a ticket.
CHANGES = frozenset({
    Op.FORWARD, Op.BACKWARD, Op.STEP, Op.ZERO_GRAD, Op.WRITE_TENSOR, Op.SET_STEP, Op.LOAD_CHECKPOINT, Op.EDIT_GRADIENTS,
    Op.CREATE_ADAPTER, Op.DELETE_ADAPTER,
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor of a request. Its source does not change until the call lets go of it."""

    tensor: Tensor
    dtype: Dtype
    rows: int
    columns: int
    source: Source

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns * ITEM_BYTES[self.dtype]


@dataclass(eq=False, slots=True)
class Call:
    """`expects` are the bytes of the result's tensors; for Tensor.ADAPTER an upper bound is not known, so it is their sum."""

    op: Op
    opened: RequestOpen
    timeout_s: float
    layer: int = 0
    dtype: Dtype = Dtype.NONE
    rows: int = 0
    columns: int = 0
    tensors: tuple[OutTensor, ...] = ()
    expects: dict[Tensor, int] = field(default_factory=dict)
    pinned: bool = False  # results go to a device
    on_settled: Callable[[Call], None] = lambda _: None  # its outcome is here
    on_unneeded: Callable[[Call], None] = lambda _: None  # its tensors are not read any more
    stamps: Stamps | None = None  # where it is measured
    # Set by the session:
    request_id: int = 0
    deadline: float = 0.0
    is_sent: bool = False  # on the current connection, or known to the server
    is_replay: bool = False  # settled before; sent again for the sake of the server's state
    is_given_up: bool = False  # its caller got an error; what comes is not wanted
    results: dict[Tensor, Buffer] = field(default_factory=dict)
    head: ResultHead | None = None
    error: KtExpertError | None = None

    @property
    def size_bytes(self) -> int:
        """What it takes of the credits."""
        return sum(tensor.nbytes for tensor in self.tensors) + sum(self.expects.values())

    @property
    def ticket(self) -> int:
        """The ticket a backward consumes; 0 for other calls."""
        return int(self.opened.backward.ticket) if self.op is Op.BACKWARD else 0

    @property
    def keeps_ticket(self) -> bool:
        return self.op is Op.FORWARD and self.opened.forward.save_for_backward

    @property
    def changes_state(self) -> bool:
        return self.op in CHANGES and (self.op is not Op.FORWARD or self.keeps_ticket)

    def frames(self, deadline_ms: int, epoch: int) -> Iterator[tuple[Header, bytes | Source]]:
        """The request and its tensors, as they are sent."""
        yield (
            self._header(FrameType.REQUEST, Tensor.NONE, self.dtype, self.rows, self.columns, deadline_ms, epoch),
            self.opened.SerializeToString(),
        )
        for each in self.tensors:
            yield self._header(FrameType.TENSOR, each.tensor, each.dtype, each.rows, each.columns, 0, epoch), each.source

    def _header(
        self, kind: FrameType, tensor: Tensor, dtype: Dtype, rows: int, columns: int, deadline_ms: int, epoch: int
    ) -> Header:
        return Header(kind, self.request_id, self.layer, self.op, tensor, dtype, rows, columns, deadline_ms, epoch)

    def drop_results(self) -> None:
        for buffer in self.results.values():
            buffer.release()
        self.results = {}
