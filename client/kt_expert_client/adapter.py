"""Names of an adapter's tensors, as a trainer sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from kt_expert_proto.lora import DEFAULT_ADAPTER, PARAMETER, LayerLora
from kt_expert_proto.v1 import service_pb2
from kt_expert_proto.v1 import session_pb2 as pb


class TensorKey(NamedTuple):
    """One tensor: a_gate, b_gate, a_up, b_up, a_down or b_down; its part is parameter, gradient, step or what an optimizer
    keeps."""

    layer: int
    tensor: str
    part: str = PARAMETER
    adapter: str = DEFAULT_ADAPTER


AdapterTensors = dict[TensorKey, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ActiveAdapter:
    """An adapter that a forward adds to the base weights, with scales of its own or the adapter's."""

    name: str
    scale_gate: float | None = None
    scale_up: float | None = None
    scale_down: float | None = None

    def to_proto(self) -> pb.ActiveAdapter:
        return pb.ActiveAdapter(
            adapter=self.name, scale_gate=self.scale_gate, scale_up=self.scale_up, scale_down=self.scale_down
        )


@dataclass(frozen=True, slots=True)
class GradientTarget:
    """Which gradients of an adapter a backward adds to: those that a step has taken begin anew, unless they are continued,
    and those that are replaced in any case. Tensors as bits: 1 is a_gate, then b_gate, a_up, b_up, a_down, b_down."""

    adapter: str
    wanted: int
    replaced: int = 0
    continued: int = 0

    def to_proto(self) -> pb.GradientTarget:
        return pb.GradientTarget(adapter=self.adapter, wanted=self.wanted, replaced=self.replaced, continued=self.continued)


@dataclass(frozen=True, slots=True)
class TensorSet:
    """Tensors, as bits, in each of some layers of an adapter; bits 0: all it has. Without layers: what has gradients."""

    adapter: str
    tensors: int = 0
    layers: tuple[int, ...] = ()

    def to_proto(self) -> service_pb2.TensorSet:
        return service_pb2.TensorSet(adapter=self.adapter, tensors=self.tensors, layers=self.layers)


__all__ = ["ActiveAdapter", "AdapterTensors", "GradientTarget", "LayerLora", "TensorKey", "TensorSet"]
