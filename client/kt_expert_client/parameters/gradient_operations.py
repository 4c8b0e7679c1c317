"""What torch's operations mean for gradients on the server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from kt_expert_client.parameters.matrix import GradientSource, gradient_of, is_same_gradient
from kt_expert_client.parameters.tensor import RemoteTensor, handles
from kt_expert_client.parameters.weight_operations import merge

aten = torch.ops.aten


def _gradients(tensor: RemoteTensor) -> tuple[GradientSource, Any] | None:
    gradient = gradient_of(tensor)
    return None if gradient is None else (gradient, gradient.matrix.store.gradients)


def _number(value: Any) -> float | None:
    """A scalar, or a tensor of one element; a distributed one, such as FSDP2's clip coefficient, as all ranks have it."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, torch.Tensor):
        return float(value) if value.numel() == 1 and not isinstance(value, RemoteTensor) else None
    return float(value)


@handles(aten.add_.Tensor)
def _accumulate(func: Any, total: Any, more: Any, *, alpha: float = 1) -> Any:
    """A backward has added to the gradient on the server already: what it returned is the same gradient. Or LoRA is merged."""
    del func
    added = (alpha == 1 and is_same_gradient(total, more)) or merge(total, more, float(alpha))
    return total if added else NotImplemented


@handles(aten.mul_.Tensor, aten.mul_.Scalar)
def _scale(func: Any, tensor: Any, factor: Any) -> Any:
    del func
    found, number = _gradients(tensor), _number(factor)
    if found is None or number is None:
        return NotImplemented
    found[1].scale(found[0], number)
    return tensor


@handles(aten.div_.Tensor, aten.div_.Scalar)
def _divide(func: Any, tensor: Any, divisor: Any) -> Any:
    number = _number(divisor)
    return NotImplemented if not number else _scale(func, tensor, 1.0 / number)


@handles(aten.neg_.default)
def _negate(func: Any, tensor: Any) -> Any:
    return _scale(func, tensor, -1.0)


@handles(aten.zero_.default)
def _zero(func: Any, tensor: Any) -> Any:
    del func
    found = _gradients(tensor)
    if found is None:
        return NotImplemented
    found[1].zero(found[0])
    return tensor


@handles(aten.clamp_.default)
def _clamp(func: Any, tensor: Any, least: float | None = None, most: float | None = None) -> Any:
    del func
    found = _gradients(tensor)
    if found is None:
        return NotImplemented
    found[1].clamp(found[0], least, most)
    return tensor


@handles(aten.clamp_min_.default)
def _clamp_min(func: Any, tensor: Any, least: float) -> Any:
    return _clamp(func, tensor, least)


@handles(aten.clamp_max_.default)
def _clamp_max(func: Any, tensor: Any, most: float) -> Any:
    return _clamp(func, tensor, None, most)


@handles(aten.linalg_vector_norm.default)
def _norm(
    func: Any, tensor: Any, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    del func
    found = _gradients(tensor)
    if found is None or dim is not None or keepdim:
        return NotImplemented
    norm = found[1].norm(found[0], float(order))
    return torch.tensor(norm, dtype=dtype or tensor.dtype, device=tensor.device)


def _each(name: str, one: Any) -> None:
    """A foreach operation, for lists that may hold plain tensors too."""
    operation = getattr(aten, name)

    def run(func: Any, tensors: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        del func
        results = []
        for index, tensor in enumerate(tensors):
            own = [arg[index] if isinstance(arg, list | tuple) else arg for arg in args]
            results.append(one(tensor, *own, **kwargs))
        return None if name.endswith("_") else results

    for overload in operation.overloads():
        handles(getattr(operation, overload))(run)


_each("_foreach_mul_", lambda tensor, factor: tensor.mul_(factor))
_each("_foreach_div_", lambda tensor, divisor: tensor.div_(divisor))
_each("_foreach_zero_", lambda tensor: tensor.zero_())
_each("_foreach_neg_", lambda tensor: tensor.neg_())
_each("_foreach_clamp_min_", lambda tensor, least: tensor.clamp_(min=least))
_each("_foreach_clamp_max_", lambda tensor, most: tensor.clamp_(max=most))
_each("_foreach_norm", lambda tensor, order=2, dtype=None: torch.linalg.vector_norm(tensor, order, dtype=dtype))


@handles(aten._amp_foreach_non_finite_check_and_unscale_.default)
def _unscale(func: Any, tensors: Sequence[torch.Tensor], found_inf: torch.Tensor, inverse: torch.Tensor) -> None:
    local = [tensor for tensor in tensors if not isinstance(tensor, RemoteTensor)]
    if local:
        func(local, found_inf, inverse)
    for tensor in tensors:
        if isinstance(tensor, RemoteTensor):
            largest = float(torch.linalg.vector_norm(tensor, math.inf))
            if not math.isfinite(largest):
                found_inf.fill_(1.0)
            tensor.mul_(float(inverse))
