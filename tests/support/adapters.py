"""The default adapter in the protocol's words."""

from __future__ import annotations

from collections.abc import Iterable

from kt_expert_proto.lora import DEFAULT_ADAPTER, LayerLora, tensor_bits
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb

ACTIVE = (spb.ActiveAdapter(adapter=DEFAULT_ADAPTER),)
GRADIENTS = (pb.TensorSet(adapter=DEFAULT_ADAPTER),)  # all it has


def targets(lora: LayerLora, *, replaced: bool = False, adapter: str = DEFAULT_ADAPTER) -> tuple[spb.GradientTarget, ...]:
    """All tensors of a layer, added to or begun anew; of a layer's own weights, those without biases."""
    bits = tensor_bits(("w_gate", "w_up", "w_down") if lora.full else lora.tensors)
    return (spb.GradientTarget(adapter=adapter, wanted=bits, replaced=bits if replaced else 0),)


def adamw(
    learning_rate: float, grad_scale: float = 1.0, sets: Iterable[pb.TensorSet] = GRADIENTS, **numbers: float
) -> pb.ParamGroup:  # fmt: skip
    """One update of all tensors that have gradients."""
    update = pb.Adam(**{"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, **numbers, "learning_rate": learning_rate})
    return pb.ParamGroup(sets=sets, grad_scale=grad_scale, adamw=update)
