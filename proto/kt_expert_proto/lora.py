"""What is trained, in the protocol's terms: the names of tensors, what an optimizer keeps of them, and one layer's settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kt_expert_proto.v1 import service_pb2 as pb

LORA_TENSORS = ("a_gate", "b_gate", "a_up", "b_up", "a_down", "b_down")
WEIGHT_TENSORS = ("w_gate", "w_up", "w_down", "bias_gate", "bias_up", "bias_down")
TENSORS = LORA_TENSORS + WEIGHT_TENSORS
DEFAULT_ADAPTER = "default"
ALL_TENSORS = (1 << len(TENSORS)) - 1
PARAMETER = "parameter"
GRADIENT = "gradient"
BASE = "base"  # the base model's own weights
STEP = "step"  # how many updates the moments of a tensor stand for
# What an optimizer keeps of a tensor, by the kind whose state it is.
SLOTS = {"exp_avg": "adamw", "exp_avg_sq": "adamw", "momentum_buffer": "sgd", "row_var": "adafactor", "col_var": "adafactor"}
PART_NUMBERS: dict[str, pb.AdapterPart] = {
    PARAMETER: pb.ADAPTER_PART_PARAMETER,
    "exp_avg": pb.ADAPTER_PART_EXP_AVG,
    "exp_avg_sq": pb.ADAPTER_PART_EXP_AVG_SQ,
    "momentum_buffer": pb.ADAPTER_PART_MOMENTUM_BUFFER,
    "row_var": pb.ADAPTER_PART_ROW_VAR,
    "col_var": pb.ADAPTER_PART_COL_VAR,
    STEP: pb.ADAPTER_PART_STEP,
    GRADIENT: pb.ADAPTER_PART_GRADIENT,
    BASE: pb.ADAPTER_PART_BASE,
}
PART_NAMES = {number: name for name, number in PART_NUMBERS.items()}


def tensor_bits(names: Iterable[str]) -> int:
    """The set of these tensors as the protocol has it: bit 0 is a_gate. Raises ValueError for a name there is not."""
    bits = 0
    for name in names:
        bits |= 1 << TENSORS.index(name)
    return bits


def tensor_names(bits: int) -> list[str]:
    """The tensors of such a set, in order."""
    return [name for index, name in enumerate(TENSORS) if bits >> index & 1]


@dataclass(frozen=True, slots=True)
class LayerLora:
    """LoRA of one layer. Rank 0 leaves a projection alone; tied: gate and up share A; scale: alpha/r or alpha/sqrt(r).

    dropout is the probability to drop a value of LoRA's input, in forwards that carry a dropout seed. full: no LoRA, but the
    layer's weights and biases.
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
    full: bool = False

    @property
    def tensors(self) -> list[str]:
        """The tensors of LoRA that such a layer has, in order."""
        has = {
            "a_gate": self.rank_gate,
            "b_gate": self.rank_gate,
            "a_up": 0 if self.tied else self.rank_up,
            "b_up": self.rank_up,
            "a_down": self.rank_down,
            "b_down": self.rank_down,
        }
        return [name for name in LORA_TENSORS if has[name]]

    def to_proto(self) -> pb.LayerLora:
        return pb.LayerLora(**{name: getattr(self, name) for name in self.__slots__})

    @classmethod
    def from_proto(cls, message: pb.LayerLora) -> LayerLora:
        return cls(**{name: getattr(message, name) for name in cls.__slots__})
