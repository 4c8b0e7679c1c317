"""An id that was used before: the outcome is told again, and nothing runs twice."""

from __future__ import annotations

import grpc
from kt_expert_proto.header import Op
from kt_expert_proto.v1 import session_pb2 as spb
from support.adapters import GRADIENTS
from support.raw import RawMember
from support.server import ServerProcess


def test_a_backward_again(server: ServerProcess, attacker: RawMember) -> None:
    ticket, backward = attacker.take_id(), attacker.take_id()
    assert attacker.ask(attacker.forward_frames(ticket))[0] is grpc.StatusCode.OK
    assert attacker.ask(attacker.backward_frames(backward, ticket))[0] is grpc.StatusCode.OK
    computed = server.metric('kt_expert_tokens_total{pass="backward"}')
    for _ in range(5):
        attacker.send(*attacker.backward_frames(backward, ticket))
    norm = attacker.call_frames(Op.GRAD_NORM, spb.RequestOpen(grad_norm=spb.GradNorm(sets=GRADIENTS, order=2.0)))
    assert attacker.ask(norm)[0] is grpc.StatusCode.OK
    assert server.metric('kt_expert_tokens_total{pass="backward"}') == computed
