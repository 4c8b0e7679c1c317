"""Protobuf messages to the runtime's values and back. Validation of single fields happens here, once."""

from __future__ import annotations

import math

from kt_expert_proto.v1 import service_pb2 as pb

from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.index import LayerPlan
from kt_expert_server.runtime.adapter_io import TensorId
from kt_expert_server.runtime.optimizer import ParamGroup, StepParams
from kt_expert_server.runtime.registry import State
from kt_expert_server.runtime.run import LayerLora, RunConfig

_DTYPES = {pb.WIRE_DTYPE_BF16: "bf16", pb.WIRE_DTYPE_FP32: "fp32"}
WIRE_DTYPES = {name: value for value, name in _DTYPES.items()}
_MOMENTS = {pb.MOMENT_DTYPE_FP32: "fp32", pb.MOMENT_DTYPE_BF16: "bf16"}
MOMENTS = {name: value for value, name in _MOMENTS.items()}
_TICKETS = {pb.TICKET_POLICY_ACTIVATIONS: "activations", pb.TICKET_POLICY_INPUTS: "inputs"}
TICKETS = {name: value for value, name in _TICKETS.items()}
STATES = {
    State.LOADING: pb.SERVER_STATE_LOADING,
    State.READY: pb.SERVER_STATE_READY,
    State.DRAINING: pb.SERVER_STATE_DRAINING,
}
_PARTS = {
    pb.ADAPTER_PART_PARAMETER: "parameter",
    pb.ADAPTER_PART_EXP_AVG: "exp_avg",
    pb.ADAPTER_PART_EXP_AVG_SQ: "exp_avg_sq",
    pb.ADAPTER_PART_MOMENTUM_BUFFER: "momentum_buffer",
    pb.ADAPTER_PART_STEP: "step",
    pb.ADAPTER_PART_ROW_VAR: "row_var",
    pb.ADAPTER_PART_COL_VAR: "col_var",
}
PARTS = {name: value for value, name in _PARTS.items()}
_MAX_LORA_SCALE = 1e6
_MAX_RANK = 1 << 16  # the engine's own bound is lower; this keeps the number an int32


def run_config(config: pb.RunConfig) -> RunConfig:
    """Raises InvalidRequest for a dtype or a scale that makes no sense."""
    if config.wire_dtype not in _DTYPES:
        raise InvalidRequest(f"wire_dtype is {config.wire_dtype}, expected WIRE_DTYPE_BF16 or WIRE_DTYPE_FP32")
    lora = []
    for entry in config.lora:
        scales = (entry.scale_gate, entry.scale_up, entry.scale_down)
        if not all(math.isfinite(scale) and abs(scale) <= _MAX_LORA_SCALE for scale in scales):
            raise InvalidRequest(f"layer {entry.layer}: LoRA scales are {scales}, expected finite numbers")
        ranks = (entry.rank_gate, entry.rank_up, entry.rank_down)
        if max(ranks) > _MAX_RANK:
            raise InvalidRequest(f"layer {entry.layer}: LoRA ranks are {ranks}, at most {_MAX_RANK} are taken")
        lora.append(LayerLora(entry.layer, entry.tied, *ranks, *scales, entry.dropout))
    if config.moment_dtype not in _MOMENTS or config.tickets not in _TICKETS:
        raise InvalidRequest(
            f"moment_dtype is {config.moment_dtype} and tickets {config.tickets}, expected values of MomentDtype and "
            "TicketPolicy"
        )
    return RunConfig(
        config.world_size,
        _DTYPES[config.wire_dtype],
        tuple(lora),
        config.seed,
        _MOMENTS[config.moment_dtype],
        _TICKETS[config.tickets],
    )


def layer_spec(plan: LayerPlan) -> pb.LayerSpec:
    return pb.LayerSpec(
        layer=plan.layer,
        num_experts=plan.num_experts,
        hidden_size=plan.hidden_size,
        intermediate_size=plan.intermediate_size,
        top_k=plan.top_k,
        activation=plan.activation.kind,
        alpha=plan.activation.alpha,
        limit=plan.activation.limit,
        has_bias=plan.has_bias,
    )


def step_params(request: pb.StepRequest) -> StepParams:
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


def timeout_s(wanted: float, limit: float) -> float:
    """A barrier's timeout: the caller's, within (0, limit]."""
    if not math.isfinite(wanted) or wanted <= 0:
        raise InvalidRequest(f"timeout_s is {wanted}, expected a number above 0")
    return min(wanted, limit)


def tensor_id(chunk: pb.AdapterChunk) -> TensorId:
    if chunk.part not in _PARTS:
        raise InvalidRequest(f"adapter part {chunk.part} is not known")
    return TensorId(chunk.layer, chunk.tensor, _PARTS[chunk.part])
