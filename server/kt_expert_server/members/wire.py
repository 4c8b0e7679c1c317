"""Protobuf messages to values and back. Validation of single fields happens here, once."""

from __future__ import annotations

import math
import re

from kt_expert_proto.dtypes import TOKEN_DTYPES
from kt_expert_proto.lora import PART_NAMES, LayerLora
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1.session_pb2 import Step, TensorName

from kt_expert_server.adapters.run_config import RunConfig
from kt_expert_server.adapters.step_params import ParamGroup, StepParams
from kt_expert_server.adapters.transfer import TensorId
from kt_expert_server.errors import InvalidRequest, NotFound, StreamReplaced

_DTYPES = {int(number): name for name, number in TOKEN_DTYPES.items()}  # WireDtype has the header's numbers
MOMENT_NAMES = {pb.MOMENT_DTYPE_FP32: "fp32", pb.MOMENT_DTYPE_BF16: "bf16"}
TICKET_NAMES = {pb.TICKET_POLICY_ACTIVATIONS: "activations", pb.TICKET_POLICY_INPUTS: "inputs"}
MOMENT_NUMBERS = {name: number for number, name in MOMENT_NAMES.items()}
TICKET_NUMBERS = {name: number for number, name in TICKET_NAMES.items()}
_MAX_WORLD_SIZE = 1024
_MAX_LORA_SCALE = 1e6
_MAX_RANK = 1 << 16  # the engine's own bound is lower; this keeps the number an int32
_MAX_LAYER = 1 << 16  # a frame's header holds 16 bits
_INSTANCE = re.compile(r"[A-Za-z0-9]{16,64}")


def run_config(config: pb.RunConfig) -> RunConfig:
    """Raises InvalidRequest for numbers that make no sense."""
    if config.wire_dtype not in _DTYPES:
        raise InvalidRequest(f"wire_dtype is {config.wire_dtype}, expected WIRE_DTYPE_BF16 or WIRE_DTYPE_FP32")
    if not 1 <= config.world_size <= _MAX_WORLD_SIZE:
        raise InvalidRequest(f"world size is {config.world_size}, expected 1 to {_MAX_WORLD_SIZE}")
    if config.moment_dtype not in MOMENT_NAMES or config.tickets not in TICKET_NAMES:
        raise InvalidRequest(
            f"moment_dtype is {config.moment_dtype} and tickets {config.tickets}, expected values of MomentDtype and "
            "TicketPolicy"
        )
    return RunConfig(
        config.world_size,
        _DTYPES[config.wire_dtype],
        tuple(_layer_lora(entry) for entry in config.lora),
        config.seed,
        MOMENT_NAMES[config.moment_dtype],
        TICKET_NAMES[config.tickets],
    )


def _layer_lora(entry: pb.LayerLora) -> LayerLora:
    scales = (entry.scale_gate, entry.scale_up, entry.scale_down)
    if not all(math.isfinite(scale) and abs(scale) <= _MAX_LORA_SCALE for scale in scales):
        raise InvalidRequest(f"layer {entry.layer}: LoRA scales are {scales}, expected finite numbers")
    ranks = (entry.rank_gate, entry.rank_up, entry.rank_down)
    if max(ranks) > _MAX_RANK or entry.layer >= _MAX_LAYER:
        raise InvalidRequest(f"layer {entry.layer}: LoRA ranks are {ranks}, at most {_MAX_RANK} are taken")
    return LayerLora.from_proto(entry)


def check_instance(instance: str) -> str:
    """Raises InvalidRequest for anything but a random word."""
    if _INSTANCE.fullmatch(instance) is None:
        raise InvalidRequest("instance is not 16 to 64 letters and digits; a trainer draws it at random, once")
    return instance


def step_params(request: Step) -> StepParams:
    """Raises InvalidRequest for groups that do not cover every tensor once, or hyper-parameters without a meaning."""
    if not request.groups:
        raise InvalidRequest("the step has no groups; expected at least one with its hyper-parameters")
    if not math.isfinite(request.grad_scale):
        raise InvalidRequest(f"grad_scale is {request.grad_scale}, expected a finite number")
    groups = []
    for group in request.groups:
        kind = group.WhichOneof("update")
        if kind is None:
            raise InvalidRequest("a group of the step has no update; expected adamw, adam, sgd or adafactor")
        update = getattr(group, kind)
        numbers = tuple((field.name, getattr(update, field.name)) for field in update.DESCRIPTOR.fields)
        groups.append(ParamGroup(tuple(sorted(group.tensors)), kind, numbers))
    params = StepParams(tuple(groups), request.grad_scale, request.new_optimizer)
    params.updates()
    return params


def tensor_id(layer: int, name: TensorName) -> TensorId:
    if name.part not in PART_NAMES:
        raise InvalidRequest(f"adapter part {name.part} is not known")
    return TensorId(layer, name.tensor, PART_NAMES[name.part])


def not_joined(run: str) -> NotFound:
    return NotFound(f"this trainer is not a member of run {run!r}; there is nothing to take up again")


def replaced(rank: int, epoch: int) -> StreamReplaced:
    return StreamReplaced(f"rank {rank} was joined again: epoch {epoch} replaces this stream")
