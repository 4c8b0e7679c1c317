"""A member that acknowledges an outcome it has not read: the memory would serve another trainer while it is being sent."""

from __future__ import annotations

import grpc
import numpy as np
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameType, Tensor
from kt_expert_proto.v1 import session_pb2 as spb
from support.adapters import ACTIVE
from support.raw import HIDDEN, TOP_K, RawMember

TOKENS = 65536  # a result of 8 MiB, more than a stream that is not read takes in


def test_acknowledging_what_is_still_being_sent(attacker: RawMember) -> None:
    opened = spb.RequestOpen(forward=spb.Forward(top_k=TOP_K, adapters=ACTIVE))
    request_id = attacker.take_id()
    attacker.send(
        (attacker.header(FrameType.REQUEST, request_id, rows=TOKENS), opened.SerializeToString()),
        attacker.tensor(request_id, Tensor.EXPERT_IDS, Dtype.INT32, np.zeros((TOKENS, TOP_K), np.int32)),
        attacker.tensor(request_id, Tensor.ROUTING_WEIGHTS, Dtype.FP32, np.full((TOKENS, TOP_K), 0.5, np.float32)),
        attacker.tensor(request_id, Tensor.HIDDEN_STATES, Dtype.FP32, np.ones((TOKENS, HIDDEN), np.float32)),
    )
    header, _ = next(attacker._incoming)  # it has its outcome, the tensor is on its way
    assert header.type is FrameType.RESULT
    attacker.acknowledge(request_id)
    error = attacker.stream_error()
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "was acknowledged before all of it was sent" in error.details()


def test_repeating_a_request_on_one_stream_queues_nothing(attacker: RawMember) -> None:
    frames = attacker.forward_frames(attacker.take_id(), save=False)
    attacker.send(*frames)
    attacker.outcome()
    for _ in range(100):
        attacker.send(*frames)
    attacker.acknowledge(1)
    attacker.send(*attacker.forward_frames(attacker.take_id(), save=False))
    header, _ = attacker.outcome()[0]
    assert header.request_id == 2, "an outcome was sent twice on one stream"
