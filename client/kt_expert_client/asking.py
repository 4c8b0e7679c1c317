"""Requests without tensors, whose outcome is waited for."""

from __future__ import annotations

from kt_expert_proto.header import Op
from kt_expert_proto.v1 import session_pb2 as pb

from kt_expert_client.session.calls import Call
from kt_expert_client.session.driver import Session

_MEETINGS = {Op.GRAD_NORM: "ask for the norm of gradients", Op.STEP: "come to the same step"}  # of all ranks


class Asking:
    """Of one run."""

    def __init__(self, session: Session, run: str, world_size: int) -> None:
        self._session, self._run, self._world_size = session, run, world_size

    def ask(self, op: Op, opened: pb.RequestOpen, timeout_s: float) -> pb.ResultHead:
        """Where the other ranks have to come too, a long wait says so. Raises the request's error."""
        call, waits_for = Call(op, opened, timeout_s), ""
        if op in _MEETINGS and self._world_size > 1:
            waits_for = f"the other ranks of run {self._run!r}, {self._world_size} in all, to {_MEETINGS[op]}"
        self._session.submit(call).wait(waits_for=waits_for)
        assert call.head is not None  # noqa: S101  # it has succeeded
        return call.head
