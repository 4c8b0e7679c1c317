"""LoRA of a run in the protocol's terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from kt_expert_proto.v1 import service_pb2 as pb

PARTS = {
    "parameter": pb.ADAPTER_PART_PARAMETER,
    "exp_avg": pb.ADAPTER_PART_EXP_AVG,
    "exp_avg_sq": pb.ADAPTER_PART_EXP_AVG_SQ,
    "momentum_buffer": pb.ADAPTER_PART_MOMENTUM_BUFFER,
    "row_var": pb.ADAPTER_PART_ROW_VAR,
    "col_var": pb.ADAPTER_PART_COL_VAR,
    "step": pb.ADAPTER_PART_STEP,
}
PART_NAMES = {value: name for name, value in PARTS.items()}


class TensorKey(NamedTuple):
    """One tensor: tensor is a_gate, b_gate, a_up, b_up, a_down or b_down; part is one of PARTS."""

    layer: int
    tensor: str
    part: str = "parameter"


AdapterTensors = dict[TensorKey, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerLora:
    """LoRA of one layer. Rank 0 leaves a projection alone; tied: gate and up share A; scale: alpha/r or alpha/sqrt(r).

    dropout is the probability to drop a value of LoRA's input, in forwards that carry a dropout seed.
    """

    layer: int
    tied: bool = False
    rank_gate: int = 0
    rank_up: int = 0
    rank_down: int = 0
    scale_gate: float = 0.0
    scale_up: float = 0.0
    scale_down: float = 0.0
    dropout: float = 0.0

    def to_proto(self) -> pb.LayerLora:
        return pb.LayerLora(
            layer=self.layer,
            tied=self.tied,
            rank_gate=self.rank_gate,
            rank_up=self.rank_up,
            rank_down=self.rank_down,
            scale_gate=self.scale_gate,
            scale_up=self.scale_up,
            scale_down=self.scale_down,
            dropout=self.dropout,
        )
