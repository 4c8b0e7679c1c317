"""What torch's operations mean for expert weights: LoRA that is merged and taken out again, and copies that need no values."""

from __future__ import annotations

from typing import Any

import torch

from kt_expert_client.parameters.active import factors
from kt_expert_client.parameters.merged import snapshot, with_added
from kt_expert_client.parameters.tensor import SET_DATA, Product, RemoteTensor, Stored, Sum, handles
from kt_expert_client.parameters.weights import WeightSource, weight_of

aten = torch.ops.aten


def merge(weight: object, more: object, sign: float) -> bool:
    """Adds LoRA's products to a weight in place. False for anything else."""
    source = weight_of(weight)
    products = _products(more)
    if source is None or not products:
        return False
    if source.matrix.is_owned:  # such weights hold their own sum
        whole = source.read()
        for product in products:
            whole = whole + sign * product.read()
        source.write(whole)
        return True
    source.copies.keep(source)
    merged = source.merged
    for product in products:
        a, b, is_b_first = factors(source.matrix.place.target, product)
        merged = with_added(merged, snapshot(a, b, sign * product.scale, is_b_first=is_b_first))
    source.merged = merged
    return True


def _products(tensor: object) -> tuple[Product, ...]:
    remote = tensor.remote if isinstance(tensor, RemoteTensor) else None
    if isinstance(remote, Product):
        return (remote,)
    return remote.products if isinstance(remote, Sum) and remote.base is None else ()


@handles(aten.sub_.Tensor)
def _subtract(func: Any, weight: Any, more: Any, *, alpha: float = 1) -> Any:
    del func
    return weight if merge(weight, more, -float(alpha)) else NotImplemented


@handles(aten.clone.default)
def _clone(func: Any, tensor: RemoteTensor, **kwargs: Any) -> Any:
    """Of weights that nobody has changed: those of the base model again, without a look at them."""
    del func, kwargs
    source = weight_of(tensor)
    if source is None or source.matrix.is_owned:
        return tensor.values().clone().to(tensor.device)
    made: RemoteTensor = RemoteTensor(Stored(source.copy({})), tensor)
    return made


def are_equal(left: object, right: object) -> bool:
    """Whether two weights have the same values as far as is known without reading them."""
    ours, theirs = weight_of(left), weight_of(right)
    return ours is not None and theirs is not None and ours.holds_what(theirs)


@handles(aten.lerp_.Scalar, aten.lerp_.Tensor)
def _interpolate(func: Any, start: Any, end: Any, weight: Any) -> Any:
    del func, weight
    return start if are_equal(start, end) else NotImplemented


@handles(aten._foreach_lerp_.Scalar, aten._foreach_lerp_.List, aten._foreach_lerp_.ScalarList)
def _interpolate_each(func: Any, starts: Any, ends: Any, weights: Any) -> None:
    del func
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        start.lerp_(end, weights[index] if isinstance(weights, list | tuple) else weights)


@handles(SET_DATA)
def _replace(func: Any, target: Any, value: Any) -> Any:
    """Weights become what a clone of them is, into which something was merged."""
    del func
    ours, theirs = weight_of(target), weight_of(value)
    if ours is None or theirs is None or not WeightSource(ours.matrix).holds_what(WeightSource(theirs.matrix)):
        return NotImplemented
    ours.copies.keep(ours)
    ours.merged = theirs.merged
    return target
