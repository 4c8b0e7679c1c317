"""What a request must bring and what it will give back, from its first frame: checked before a byte is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kt_expert_proto.dtypes import ITEM_BYTES, TOKEN_DTYPES, Dtype
from kt_expert_proto.header import Header, Op, Tensor
from kt_expert_proto.lora import BASE
from kt_expert_proto.v1.session_pb2 import RequestOpen

from kt_expert_server.adapters.tensor_sets import find_adapter
from kt_expert_server.adapters.transfer import base_shape, shape_of
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.members import wire
from kt_expert_server.members.limits import Limits
from kt_expert_server.members.run import Run
from kt_expert_server.model.index import LayerPlan
from kt_expert_server.model.loader import BaseModel

_OPERATIONS = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.GRAD_NORM: "grad_norm",
    Op.STEP: "step",
    Op.ZERO_GRAD: "zero_grad",
    Op.LIST_TENSORS: "list_tensors",
    Op.READ_TENSOR: "read_tensor",
    Op.WRITE_TENSOR: "write_tensor",
    Op.SET_STEP: "set_step",
    Op.SAVE_CHECKPOINT: "save_checkpoint",
    Op.LOAD_CHECKPOINT: "load_checkpoint",
    Op.LEAVE: "leave",
    Op.EDIT_GRADIENTS: "edit_gradients",
    Op.CREATE_ADAPTER: "create_adapter",
    Op.DELETE_ADAPTER: "delete_adapter",
}
_ROUTE_ITEM_BYTES = 4  # of expert ids, routing weights and their gradients


@dataclass(frozen=True, slots=True)
class Declaration:
    """Tensors that follow, with dtype, rows and columns, and the bytes of the results."""

    tensors: dict[Tensor, tuple[Dtype, int, int]] = field(default_factory=dict)
    result_bytes: int = 0

    @property
    def tensor_bytes(self) -> int:
        return sum(ITEM_BYTES[dtype] * rows * columns for dtype, rows, columns in self.tensors.values())


def declare(header: Header, opened: RequestOpen, run: Run, model: BaseModel, limits: Limits) -> Declaration:
    """Raises InvalidRequest or NotFound for a request that cannot be served."""
    expected = _OPERATIONS.get(header.op)
    if expected is None or opened.WhichOneof("operation") != expected:
        raise InvalidRequest(
            f"op {header.op.name} came with {opened.WhichOneof('operation')}, expected one of "
            f"{', '.join(op.name for op in _OPERATIONS)} with its own message"
        )
    match header.op:
        case Op.FORWARD | Op.BACKWARD:
            declared = _pass(header, opened, run, model, limits)
        case Op.READ_TENSOR:
            declared = _read(header, opened, run, model)
        case Op.WRITE_TENSOR:
            declared = _write(header, opened, run)
        case Op.STEP:
            wire.step_params(opened.step)
            declared = Declaration()
        case Op.GRAD_NORM:
            wire.tensor_sets(opened.grad_norm.sets)
            wire.norm_order(opened.grad_norm)
            declared = Declaration()
        case Op.EDIT_GRADIENTS:
            wire.edits(opened.edit_gradients)
            declared = Declaration()
        case Op.CREATE_ADAPTER:
            wire.adapter_request(opened.create_adapter, run.config.seed)
            declared = Declaration()
        case _:
            declared = Declaration()
    total = declared.tensor_bytes + declared.result_bytes
    if total > limits.max_request_bytes:
        raise InvalidRequest(f"the request's tensors take {total} bytes, at most {limits.max_request_bytes} are taken")
    return declared


def _pass(header: Header, opened: RequestOpen, run: Run, model: BaseModel, limits: Limits) -> Declaration:
    plan = model.require_layer(header.layer).plan
    if header.columns != plan.hidden_size:
        raise InvalidRequest(f"layer {header.layer} takes hidden size {plan.hidden_size}, the request has {header.columns}")
    dtype = TOKEN_DTYPES[run.config.wire_dtype]
    if header.dtype is not dtype:
        raise InvalidRequest(f"this run's tokens travel as {dtype.name}, the request has {header.dtype.name}")
    tokens = header.rows
    if tokens > limits.max_tokens:
        raise InvalidRequest(f"the request has {tokens} tokens, at most {limits.max_tokens} are taken; split it")
    hidden_bytes = tokens * plan.hidden_size * ITEM_BYTES[dtype]
    if header.op is Op.BACKWARD:
        wire.targets(opened.backward)
        top_k = _top_k(opened.backward.top_k or plan.top_k, header, plan)
        weights_bytes = tokens * top_k * _ROUTE_ITEM_BYTES
        return Declaration({Tensor.GRAD_OUTPUT: (dtype, tokens, plan.hidden_size)}, hidden_bytes + weights_bytes)
    wire.active_adapters(opened.forward)
    top_k = _top_k(opened.forward.top_k, header, plan)
    tensors = {
        Tensor.EXPERT_IDS: (Dtype.INT32, tokens, top_k),
        Tensor.ROUTING_WEIGHTS: (Dtype.FP32, tokens, top_k),
        Tensor.HIDDEN_STATES: (dtype, tokens, plan.hidden_size),
    }
    return Declaration(tensors, hidden_bytes)


def _top_k(asked: int, header: Header, plan: LayerPlan) -> int:
    """A trainer may route to other numbers of experts than the config says. Raises InvalidRequest for more than there are."""
    if not 1 <= asked <= plan.num_experts:
        raise InvalidRequest(f"layer {header.layer} has {plan.num_experts} experts, the request routes each token to {asked}")
    return asked


def _read(header: Header, opened: RequestOpen, run: Run, model: BaseModel) -> Declaration:
    tensor = wire.tensor_id(header.layer, opened.read_tensor)
    if tensor.part == BASE:
        shape = base_shape(model.require_layer(tensor.layer), tensor)
    else:
        shape = shape_of(find_adapter(run.adapters, tensor.adapter), tensor)
    return Declaration(result_bytes=math.prod(shape) * ITEM_BYTES[Dtype.FP32])


def _write(header: Header, opened: RequestOpen, run: Run) -> Declaration:
    tensor = wire.tensor_id(header.layer, opened.write_tensor)
    if tensor.part == BASE:
        raise InvalidRequest("the base model's weights are shared by all runs and cannot be written; train an adapter of them")
    experts, rows, columns = shape_of(find_adapter(run.adapters, tensor.adapter), tensor)
    if (header.rows, header.columns) != (experts * rows, columns):
        raise InvalidRequest(
            f"{tensor} has shape {(header.rows, header.columns)}, expected {experts} times {rows} rows of {columns}"
        )
    return Declaration({Tensor.ADAPTER: (Dtype.FP32, header.rows, header.columns)})
