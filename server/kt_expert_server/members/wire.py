"""Protobuf messages to values and back. Validation of single fields happens here, once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from kt_expert_proto.dtypes import TOKEN_DTYPES
from kt_expert_proto.lora import ALL_TENSORS, DEFAULT_ADAPTER, PART_NAMES, LayerLora
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1.session_pb2 import Backward, CreateAdapter, EditGradients, Forward, GradNorm, Step, TensorName

from kt_expert_server.adapters.run_config import RunConfig
from kt_expert_server.adapters.step_params import ParamGroup, StepParams
from kt_expert_server.adapters.tensor_sets import TensorSet
from kt_expert_server.adapters.transfer import TensorId
from kt_expert_server.engine.adapter_work import AdapterRequest, Edit
from kt_expert_server.engine.backward import Target
from kt_expert_server.engine.passes import AskedAdapter
from kt_expert_server.errors import InvalidRequest, NotFound, StreamReplaced
from kt_expert_server.names import check_name

_DTYPES = {int(number): name for name, number in TOKEN_DTYPES.items()}  # WireDtype has the header's numbers
MOMENT_NAMES = {pb.MOMENT_DTYPE_FP32: "fp32", pb.MOMENT_DTYPE_BF16: "bf16"}
TICKET_NAMES = {pb.TICKET_POLICY_ACTIVATIONS: "activations", pb.TICKET_POLICY_INPUTS: "inputs"}
MOMENT_NUMBERS = {name: number for number, name in MOMENT_NAMES.items()}
TICKET_NUMBERS = {name: number for number, name in TICKET_NAMES.items()}
_MAX_WORLD_SIZE = 1024
_MAX_LORA_SCALE = 1e6
_MAX_RANK = 1 << 16  # the engine's own bound is lower; this keeps the number an int32
_MAX_LAYER = 1 << 16  # a frame's header holds 16 bits
_MAX_EXPERTS = 1 << 16  # what the engine indexes
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
    _check_scales(f"layer {entry.layer}", (entry.scale_gate, entry.scale_up, entry.scale_down))
    ranks = (entry.rank_gate, entry.rank_up, entry.rank_down)
    if max(ranks) > _MAX_RANK or entry.layer >= _MAX_LAYER:
        raise InvalidRequest(f"layer {entry.layer}: LoRA ranks are {ranks}, at most {_MAX_RANK} are taken")
    return LayerLora.from_proto(entry)


def _check_scales(what: str, scales: Iterable[float]) -> None:
    for scale in scales:
        if not math.isfinite(scale) or abs(scale) > _MAX_LORA_SCALE:
            raise InvalidRequest(f"{what}: LoRA scale is {scale}, expected a finite number, at most {_MAX_LORA_SCALE:g}")


def check_instance(instance: str) -> str:
    """Raises InvalidRequest for anything but a random word."""
    if _INSTANCE.fullmatch(instance) is None:
        raise InvalidRequest("instance is not 16 to 64 letters and digits; a trainer draws it at random, once")
    return instance


def step_params(request: Step) -> StepParams:
    """Raises InvalidRequest for a tensor in two groups, or hyper-parameters without a meaning."""
    if not request.groups:
        raise InvalidRequest("the step has no groups; expected at least one with its hyper-parameters")
    params = StepParams(tuple(_group(group) for group in request.groups), tensor_sets(request.kept))
    params.check()
    return params


def _group(group: pb.ParamGroup) -> ParamGroup:
    kind = group.WhichOneof("update")
    if kind is None:
        raise InvalidRequest("a group of the step has no update; expected adamw, adam, sgd or adafactor")
    if not group.sets:
        raise InvalidRequest("a group of the step names no tensors")
    update = getattr(group, kind)
    numbers = tuple((field.name, getattr(update, field.name)) for field in update.DESCRIPTOR.fields)
    return ParamGroup(tensor_sets(group.sets), kind, numbers, group.grad_scale, group.new_optimizer)


def tensor_sets(sets: Iterable[pb.TensorSet]) -> tuple[TensorSet, ...]:
    """Raises InvalidRequest for bits beyond those of tensors, or a layer named twice."""
    found = []
    for each in sets:
        if each.tensors & ~ALL_TENSORS or len(set(each.layers)) != len(each.layers):
            raise InvalidRequest(
                f"a set names tensors {each.tensors:#x} in layers {list(each.layers)}; expected bits of {ALL_TENSORS:#x} and "
                "each layer once"
            )
        found.append(TensorSet(each.adapter, each.tensors, tuple(each.layers)))
    return tuple(found)


def norm_order(request: GradNorm) -> float:
    """Raises InvalidRequest for one there is no norm of."""
    if math.isnan(request.order) or -math.inf < request.order < 0.0:
        raise InvalidRequest(f"the order of the norm is {request.order}, expected at least 0, or -inf")
    return request.order


def edits(request: EditGradients) -> tuple[Edit, ...]:
    """Raises InvalidRequest for a change that is none."""
    found = []
    for each in request.edits:
        sets, clamp = tensor_sets(each.sets), each.clamp
        least = clamp.least if clamp.HasField("least") else None
        most = clamp.most if clamp.HasField("most") else None
        match each.WhichOneof("change"):
            case "scale":
                found.append(Edit(sets, scale=each.scale))
            case "clamp" if least is not None or most is not None:
                found.append(Edit(sets, least=least, most=most))
            case "zero" if each.zero:
                found.append(Edit(sets, zero=True))
            case _:
                raise InvalidRequest("an edit of gradients says neither by what to scale, nor where to clamp, nor to zero")
    return tuple(found)


def active_adapters(request: Forward) -> tuple[AskedAdapter, ...]:
    """Raises InvalidRequest for scales without a meaning, or an adapter named twice."""
    found = []
    for each in request.adapters:
        gate = each.scale_gate if each.HasField("scale_gate") else None
        up = each.scale_up if each.HasField("scale_up") else None
        down = each.scale_down if each.HasField("scale_down") else None
        _check_scales(f"adapter {each.adapter!r}", [scale for scale in (gate, up, down) if scale is not None])
        found.append(AskedAdapter(each.adapter, (gate, up, down)))
    if len({each.name for each in found}) != len(found):
        raise InvalidRequest(f"a forward names an adapter twice: {', '.join(each.name for each in found)}")
    return tuple(found)


def targets(request: Backward) -> tuple[Target, ...]:
    """Raises InvalidRequest for an adapter named twice."""
    found = tuple(Target(each.adapter, each.wanted, each.replaced, each.continued) for each in request.targets)
    if len({each.adapter for each in found}) != len(found):
        raise InvalidRequest(f"a backward names an adapter twice: {', '.join(each.adapter for each in found)}")
    return found


def adapter_request(request: CreateAdapter, seed: int, maker: str = "") -> AdapterRequest:
    """Raises InvalidRequest for a name or settings without a meaning."""
    check_name("adapter", request.adapter)
    if bool(request.copy_of) == bool(request.lora):
        raise InvalidRequest("an adapter is made of layers, or as the copy of another one: give one of the two")
    lora = tuple(_layer_lora(entry) for entry in request.lora)
    seed_of_a = seed if request.initialise else None
    return AdapterRequest(request.adapter, lora, request.copy_of, request.trainable, seed_of_a, maker)


def tensor_id(layer: int, name: TensorName) -> TensorId:
    if name.part not in PART_NAMES:
        raise InvalidRequest(f"adapter part {name.part} is not known")
    if max(name.first_expert, name.experts) > _MAX_EXPERTS:
        raise InvalidRequest(f"experts {name.first_expert} and on, {name.experts} of them, are asked for; no layer has so many")
    return TensorId(name.adapter or DEFAULT_ADAPTER, layer, name.tensor, PART_NAMES[name.part], name.first_expert, name.experts)


def not_joined(run: str) -> NotFound:
    return NotFound(f"this trainer is not a member of run {run!r}; there is nothing to take up again")


def replaced(rank: int, epoch: int) -> StreamReplaced:
    return StreamReplaced(f"rank {rank} was joined again: epoch {epoch} replaces this stream")
