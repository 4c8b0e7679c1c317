"""Optimizers the server knows, with torch.optim's names and defaults, and how a torch optimizer translates."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from kt_expert_proto.lora import ALL_TENSORS, DEFAULT_ADAPTER, TENSORS, tensor_bits
from kt_expert_proto.v1 import service_pb2 as pb

from kt_expert_client.errors import InvalidRequest, UnsupportedModel

_FP32_EPS = torch.finfo(torch.float32).eps
_KNOWN = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor)


@dataclass(frozen=True, slots=True)
class AdamW:
    """Hyper-parameters of one step, as a torch param group has them. Weight decay apart from the gradient."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    def group(self) -> pb.ParamGroup:
        """The update in the protocol's form, without the tensors it is for."""
        return pb.ParamGroup(adamw=pb.Adam(**asdict(self)))


@dataclass(frozen=True, slots=True)
class Adam:
    """AdamW's neighbour whose weight decay is added to the gradient (L2)."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def group(self) -> pb.ParamGroup:
        """The update in the protocol's form, without the tensors it is for."""
        return pb.ParamGroup(adam=pb.Adam(**asdict(self)))


@dataclass(frozen=True, slots=True)
class Sgd:
    """torch.optim.SGD."""

    learning_rate: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def group(self) -> pb.ParamGroup:
        """The update in the protocol's form, without the tensors it is for."""
        return pb.ParamGroup(sgd=pb.Sgd(**asdict(self)))


@dataclass(frozen=True, slots=True)
class Adafactor:
    """torch.optim.Adafactor; every expert's LoRA matrix is a parameter of its own."""

    learning_rate: float
    beta2_decay: float = -0.8
    eps1: float = _FP32_EPS
    eps2: float = 1e-3
    clip_threshold: float = 1.0
    weight_decay: float = 0.0

    def group(self) -> pb.ParamGroup:
        """The update in the protocol's form, without the tensors it is for."""
        return pb.ParamGroup(adafactor=pb.Adafactor(**asdict(self)))


Update = AdamW | Adam | Sgd | Adafactor


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Hyper-parameters for some of a_gate, b_gate, a_up, b_up, a_down, b_down of an adapter, or for all of them that no other
    group of the step names."""

    update: Update
    tensors: tuple[str, ...] = ()
    adapter: str = DEFAULT_ADAPTER


def step_groups(groups: Sequence[ParamGroup], grad_scale: float, *, new_optimizer: bool) -> list[pb.ParamGroup]:
    """In the protocol's form. Raises InvalidRequest for a name there is not."""
    found = []
    for group in groups:
        others = [each for each in groups if each.adapter == group.adapter and each.tensors]
        try:
            named = tensor_bits(group.tensors) or ALL_TENSORS & ~tensor_bits(name for each in others for name in each.tensors)
        except ValueError:
            raise InvalidRequest(f"a group names tensors {group.tensors}, expected some of {', '.join(TENSORS)}") from None
        if named:
            message = group.update.group()
            message.sets.append(pb.TensorSet(adapter=group.adapter, tensors=named))
            message.grad_scale, message.new_optimizer = grad_scale, new_optimizer
            found.append(message)
    return found


def translate(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Update:
    """What the server has to do for this group. Raises UnsupportedModel for what it cannot."""
    name = f"{type(optimizer).__module__}.{type(optimizer).__name__}"
    for option in ("maximize", "amsgrad"):
        if group.get(option):
            raise UnsupportedModel(f"the server has no {option}, with which the {name} was made; make it without")
    if isinstance(optimizer, _KNOWN) and not _steps_like_torch(optimizer):
        raise UnsupportedModel(f"{name} has a step of its own, which the server does not know; use torch.optim's")
    rate, decay = float(group.get("lr", 0.0)), float(group.get("weight_decay", 0.0))
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        beta1, beta2 = group["betas"]
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        kind = AdamW if decoupled else Adam
        return kind(rate, float(beta1), float(beta2), float(group["eps"]), decay)
    if isinstance(optimizer, torch.optim.SGD):
        return Sgd(rate, float(group["momentum"]), float(group["dampening"]), decay, bool(group["nesterov"]))
    if isinstance(optimizer, torch.optim.Adafactor):
        raise UnsupportedModel(
            "torch.optim.Adafactor factors the moments of a whole parameter, in which PEFT keeps all experts' matrices, and "
            "the server those of each expert's matrix: the numbers would differ; use torch.optim's AdamW, Adam or SGD"
        )
    raise UnsupportedModel(f"the server steps as torch.optim's AdamW, Adam and SGD do; the trainer's optimizer is {name}")


def _steps_like_torch(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() is that of a torch class, seen through the wrappers torch and its schedulers put around it."""
    return inspect.unwrap(type(optimizer).step) in {inspect.unwrap(known.step) for known in _KNOWN}
