"""Headers that announce absurd sizes: nothing is allocated for them."""

from __future__ import annotations

import grpc
import pytest
from kt_expert_proto.header import Op
from kt_expert_proto.v1 import session_pb2 as spb
from support.raw import RawMember
from support.server import ServerProcess

HUGE = (1 << 32) - 1


@pytest.mark.parametrize(("rows", "columns"), [(HUGE, HUGE), (HUGE, 32), (3, HUGE), (0, HUGE)])
@pytest.mark.parametrize("op", [Op.FORWARD, Op.BACKWARD, Op.WRITE_TENSOR])
def test_sizes(server: ServerProcess, attacker: RawMember, op: Op, rows: int, columns: int) -> None:
    opened = {
        Op.FORWARD: spb.RequestOpen(forward=spb.Forward(top_k=2)),
        Op.BACKWARD: spb.RequestOpen(backward=spb.Backward(ticket=1)),
        Op.WRITE_TENSOR: spb.RequestOpen(write_tensor=spb.TensorName(tensor="a_down", part=1)),
    }[op]
    before = server.metric("process_resident_memory_bytes")
    code, _ = attacker.ask(attacker.call_frames(op, opened, rows=rows, columns=columns))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert server.metric("process_resident_memory_bytes") < before + (64 << 20)
