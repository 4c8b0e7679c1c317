"""What the engine is given: pieces of work that are prepared and committed on the core's thread and run on the engine's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass, field

import kt_expert_native as native
from kt_expert_proto.header import Header
from kt_expert_proto.v1.session_pb2 import ResultHead

from kt_expert_server.engine.budget import Holdings
from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.errors import DeadlinePassed, InternalError, InvalidRequest, OutOfCapacity, RequestCancelled, ServerError


@dataclass(slots=True)
class Outcome:
    """What became of a request: a result with its tensors, or an error."""

    head: ResultHead | None = None
    tensors: list[tuple[Header, PooledBuffer]] = field(default_factory=list)  # headers without id and epoch
    error: ServerError | None = None

    @property
    def is_leaving(self) -> bool:
        """A transport has not sent all of its tensors yet."""
        return any(buffer.is_shared for _, buffer in self.tensors)

    def release(self) -> None:
        """Gives its tensors' memory back. Safe to call twice."""
        for _, buffer in self.tensors:
            buffer.release()
        self.tensors = []


PASSES = ("forward", "backward")


class Work(ABC):
    """One piece for the engine. `prepare` and `commit` cannot be interrupted. Between them no other work of the same run is
    done, but passes of other members that share this one: the engine does one piece at a time, and between the parts of a long
    one only what other runs ask for."""

    kind = "other"  # forward, backward, step: what is measured apart
    cost = 1.0  # of the engine's time, against other pieces; of one part
    parts = 1  # between which the engine may do others' work
    tokens = 0  # of a pass

    def __init__(self) -> None:
        self.held = Holdings()  # released by `end`, whatever became of the work
        self.token: native.CancelToken | None = None
        self.spent_s = 0.0  # by the engine, on parts that have ended

    def company(self) -> Hashable | None:
        """What pieces have in common that may be computed in one pass over the weights. None: it is computed alone."""
        return None

    def prepare(self) -> None:  # noqa: B027  # most work has nothing to prepare
        """Checks and reserves. Raises ServerError; nothing has changed then."""

    @abstractmethod
    def run_part(self, part: int) -> None:
        """On the engine's thread, one after another. Raises native errors or ServerError; nothing has changed then."""

    @abstractmethod
    def commit(self) -> Outcome:
        """Makes what `run` did visible. Cannot fail."""

    def end(self) -> None:
        """Gives back what the work held. Called once, after commit or failure."""
        self.held.release()


class WholeWork(Work):
    """A piece of one part."""

    def run_part(self, part: int) -> None:
        del part
        self.run()

    @abstractmethod
    def run(self) -> None:
        """See run_part."""


_NATIVE_ERRORS: tuple[tuple[type[Exception], type[ServerError]], ...] = (
    (native.InvalidArgument, InvalidRequest),
    (native.Cancelled, RequestCancelled),
    (native.DeadlineExceeded, DeadlinePassed),
    (native.NativeError, InternalError),  # the others' base: last
)


def as_server_error(error: Exception) -> ServerError | None:
    """The server's error for one that a piece of work raised. None for a fault of ours."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, MemoryError):
        return OutOfCapacity("the engine could not get the memory for this operation; send fewer tokens")
    return next((ours(str(error)) for theirs, ours in _NATIVE_ERRORS if isinstance(error, theirs)), None)
