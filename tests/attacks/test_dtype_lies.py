"""Tensors of another dtype or shape than the request announced."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import Tensor
from support.raw import HIDDEN, TOKENS, TOP_K, RawMember

LIES = {
    "ids as floats": (Tensor.EXPERT_IDS, Dtype.FP32, np.zeros((TOKENS, TOP_K), np.float32)),
    "weights as ids": (Tensor.ROUTING_WEIGHTS, Dtype.INT32, np.zeros((TOKENS, TOP_K), np.int32)),
    "half the hidden size": (Tensor.HIDDEN_STATES, Dtype.FP32, np.zeros((TOKENS, HIDDEN // 2), np.float32)),
    "a result": (Tensor.OUTPUT, Dtype.FP32, np.zeros((TOKENS, HIDDEN), np.float32)),
    "an adapter": (Tensor.ADAPTER, Dtype.FP32, np.zeros((TOKENS, HIDDEN), np.float32)),
}


@pytest.mark.parametrize("what", LIES)
def test_lies(attacker: RawMember, what: str) -> None:
    request_id = attacker.take_id()
    attacker.send(attacker.forward_frames(request_id)[0], attacker.tensor(request_id, *LIES[what]))
    assert attacker.stream_error().code() is grpc.StatusCode.INVALID_ARGUMENT
