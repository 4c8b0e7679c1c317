"""What torch's operations mean for tensors on the server: other views, dtypes and devices of them, weights with LoRA on them,
and values that go in and out."""

from __future__ import annotations

from typing import Any

import torch

from kt_expert_client.parameters.matrix import is_same_gradient
from kt_expert_client.parameters.tensor import Product, RemoteTensor, Stored, Sum, View, handles, late_copy, source_behind
from kt_expert_client.parameters.weight_operations import are_equal

aten = torch.ops.aten


@handles(aten.detach.default, aten.alias.default)
def _same(func: Any, tensor: RemoteTensor) -> RemoteTensor:
    del func
    made: RemoteTensor = RemoteTensor(tensor.remote, tensor)
    return made


@handles(
    aten.view.default,
    aten._unsafe_view.default,
    aten._reshape_alias.default,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.as_strided.default,
)
def _view(func: Any, tensor: RemoteTensor, *args: Any, **kwargs: Any) -> Any:
    remote = tensor.remote
    base = remote.base if isinstance(remote, View) else tensor
    geometry = func(remote.geometry if isinstance(remote, View) else tensor.geometry(), *args, **kwargs)
    like = RemoteTensor(View(base, geometry), geometry, dtype=tensor.dtype, device=tensor.device)
    same = geometry.shape == base.shape and geometry.stride() == base.stride()
    return RemoteTensor(base.remote, base, dtype=tensor.dtype, device=tensor.device) if same else like


@handles(aten._to_copy.default)
def _to(
    func: Any, tensor: RemoteTensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **kwargs: Any
) -> RemoteTensor:
    """A copy of it, but for what late_copy says."""
    dtype = dtype or tensor.dtype
    geometry = func(tensor.geometry(), dtype=dtype, memory_format=kwargs.get("memory_format"))
    made: RemoteTensor = RemoteTensor(late_copy(tensor), geometry, dtype=dtype, device=device or tensor.device)
    return made


@handles(aten.copy_.default)
def _copy(func: Any, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(target, RemoteTensor):
        assert isinstance(source, RemoteTensor)  # noqa: S101  # one of the two is
        return func(target, source.values(), non_blocking)
    if not isinstance(target.remote, Stored):
        return NotImplemented
    if are_equal(target, source):
        return target
    values = source.values() if isinstance(source, RemoteTensor) else source
    target.write(values.to(target.dtype).expand(target.shape))
    return target


@handles(aten.set_.source_Tensor)
def _set(func: Any, target: torch.Tensor, source: torch.Tensor) -> Any:
    """`target` is what `source` is from here on: torch.nn.utils.parametrize does it to a parameter and itself."""
    del func
    if not isinstance(target, RemoteTensor) or not isinstance(source, RemoteTensor):
        return NotImplemented
    target.remote = source.remote
    return target


@handles(aten.bmm.default)
def _product(func: Any, left: torch.Tensor, right: torch.Tensor) -> Any:
    if not isinstance(left, RemoteTensor) or not isinstance(right, RemoteTensor):
        return NotImplemented
    return RemoteTensor(Product(left, right, 1.0), func(left.geometry(), right.geometry()), device=left.device)


@handles(aten.mul.Tensor, aten.mul.Scalar)
def _scaled(func: Any, tensor: torch.Tensor, factor: Any) -> Any:
    del func
    if not isinstance(tensor, RemoteTensor) or not isinstance(tensor.remote, Product) or isinstance(factor, RemoteTensor):
        return NotImplemented
    if isinstance(factor, torch.Tensor) and factor.numel() != 1:
        return NotImplemented
    product = tensor.remote
    return RemoteTensor(Product(product.left, product.right, product.scale * float(factor)), tensor)


@handles(aten.baddbmm.default)
def _with_product(
    func: Any, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> Any:
    del func
    given = (weight, left, right)
    if beta != 1 or not all(isinstance(each, RemoteTensor) for each in given):
        return NotImplemented
    return _added(weight, (Product(left, right, float(alpha)),))  # type: ignore[arg-type]


@handles(aten.add.Tensor)
def _sum(func: Any, left: torch.Tensor, right: torch.Tensor, *, alpha: float = 1) -> Any:
    del func
    if alpha != 1 or not isinstance(left, RemoteTensor) or not isinstance(right, RemoteTensor):
        return NotImplemented
    if is_same_gradient(left, right):  # a backward has added to it on the server
        return RemoteTensor(left.remote, left)
    if isinstance(right.remote, Product):
        return _added(left, (right.remote,))
    if isinstance(right.remote, Sum) and right.remote.base is None:
        return _added(left, right.remote.products)
    return NotImplemented


def _added(weight: RemoteTensor, products: tuple[Product, ...]) -> Any:
    remote = weight.remote
    if isinstance(remote, Sum):
        return RemoteTensor(Sum(remote.base, remote.products + products), weight)
    if isinstance(remote, Product):
        return RemoteTensor(Sum(None, (remote, *products)), weight)
    return RemoteTensor(Sum(weight, products), weight) if source_behind(weight) is not None else NotImplemented
