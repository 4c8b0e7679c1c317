"""Names of an adapter's tensors, as a trainer sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kt_expert_proto.lora import PARAMETER, LayerLora


class TensorKey(NamedTuple):
    """One tensor: a_gate, b_gate, a_up, b_up, a_down or b_down; its part is parameter, step or what an optimizer keeps."""

    layer: int
    tensor: str
    part: str = PARAMETER


AdapterTensors = dict[TensorKey, torch.Tensor]

__all__ = ["AdapterTensors", "LayerLora", "TensorKey"]
