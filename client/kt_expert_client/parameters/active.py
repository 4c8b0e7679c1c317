"""What a forward reads off the experts' weights: which adapters are on them, and which parameters its output depends on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kt_expert_client.adapter import ActiveAdapter
from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.parameters.lora import LoraMatrix
from kt_expert_client.parameters.matrix import DOWN, GATE_UP, A, B, matrix_behind
from kt_expert_client.parameters.tensor import LateCopy, Product, RemoteTensor, Sum, View
from kt_expert_client.parameters.weights import WeightSource, weight_behind


def adapters_on(
    layer: int, gate_up: torch.Tensor, down: torch.Tensor, biases: Sequence[torch.Tensor]
) -> tuple[tuple[ActiveAdapter, ...], list[torch.Tensor]]:
    """The adapters that are on a layer's weights, with their scales, and the parameters that the output depends on. Raises
    UnsupportedModel for anything else that was made of the weights."""
    scales: dict[str, dict[str, float]] = {}
    leaves: list[torch.Tensor] = []
    owners: list[WeightSource] = []

    def add(adapter: str, target: str, scale: float) -> None:
        of_adapter = scales.setdefault(adapter, {})
        if target in of_adapter:
            raise UnsupportedModel(f"adapter {adapter!r} is on {target} of layer {layer} twice")
        of_adapter[target] = scale

    parts = {target: _parts(target, weight) for target, weight in ((GATE_UP, gate_up), (DOWN, down))}
    for base, _, products in parts.values():
        _follow([base, *(_base_of(side) for each in products for side in (each.left, each.right)), *biases])
    for target, (base, source, products) in parts.items():
        if source.merged and base.requires_grad and torch.is_grad_enabled():
            source.matrix.prepare()  # gradients are those of weights that hold their own sum
        leaves.append(base)
        owners.append(source)
        for each in source.merged:
            add(each.a.place.adapter, target, each.scale)
        for product in products:
            a, *_ = factors(target, product)
            add(a.place.adapter, target, product.scale)
            leaves += [_base_of(product.left), _base_of(product.right)]
    for bias in biases:
        source = _bias(bias)
        leaves.append(bias)
        owners.append(source)
    return (*_own(layer, owners), *(_active(name, by_target) for name, by_target in scales.items())), leaves


def _follow(tensors: Sequence[torch.Tensor]) -> None:
    for each in tensors:
        matrix = matrix_behind(each)
        if matrix is not None:
            matrix.store.gradients.follow(matrix, each)


def _own(layer: int, owners: Sequence[WeightSource]) -> list[ActiveAdapter]:
    """The adapter of the run's own weights, where it has some of the layer."""
    first = owners[0].matrix
    for each in owners:
        if each.matrix.weights is not first.weights or each.matrix.place.layer != layer:
            raise UnsupportedModel(f"the experts of layer {layer} hold {each.name}; the parameters of one layer stay together")
    return [ActiveAdapter(first.place.adapter)] if first.is_owned else []


def _active(name: str, scales: dict[str, float]) -> ActiveAdapter:
    """A target without a scale is switched off."""
    gate_up = scales.get(GATE_UP, 0.0)
    return ActiveAdapter(name, gate_up, gate_up, scales.get(DOWN, 0.0))


def _parts(target: str, weight: torch.Tensor) -> tuple[RemoteTensor, WeightSource, tuple[Product, ...]]:
    if isinstance(weight, RemoteTensor):
        remote = weight.remote
        base, products = (remote.base, remote.products) if isinstance(remote, Sum) else (weight, ())
        source = weight_behind(base)
        if base is not None and source is not None and source.matrix.place.target == target:
            return base, source, products
    raise UnsupportedModel(
        f"the experts' {target} is {weight!r:.200}, expected the server's weights, alone or with LoRA on them; other changes "
        "of expert weights are not available"
    )


def _bias(bias: torch.Tensor) -> WeightSource:
    source = weight_behind(bias)
    if source is None:
        raise UnsupportedModel(f"the experts' bias is {bias!r:.200}, expected the server's")
    return source


def factors(target: str, product: Product) -> tuple[LoraMatrix, LoraMatrix, bool]:
    """LoRA's two matrices, A and B, that a product is made of, and whether it is B A. Raises UnsupportedModel where its factors
    are not the two of one adapter."""
    left, right = (matrix_behind(_base_of(side)) for side in (product.left, product.right))
    if isinstance(left, LoraMatrix) and isinstance(right, LoraMatrix):
        is_b_first = left.place.side == B
        a, b = (right, left) if is_b_first else (left, right)
        same = (a.place.adapter, a.place.layer, a.place.target) == (b.place.adapter, b.place.layer, b.place.target)
        if same and a.place.target == target and (a.place.side, b.place.side) == (A, B):
            expected = _expected_strides(a, is_b_first=is_b_first)
            if (product.left.stride(), product.right.stride()) == expected:
                return a, b, is_b_first
    raise UnsupportedModel(f"what is added to the experts' {target} is not the product of LoRA's two matrices of one adapter")


def _expected_strides(a: LoraMatrix, *, is_b_first: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the views PEFT multiplies, for each expert: B A, or A^T B^T where the weight is [E, in, out]."""
    experts, rank, inputs = a.shape.experts, a.shape.rank, a.shape.inputs
    if a.shape.swapped and is_b_first:  # PEFT's A^T B^T of matrices that are B and A
        return (rank * a.shape.outputs, 1, a.shape.outputs), (1, experts, rank * experts)
    if is_b_first:
        return (1, rank * experts, experts), (rank * inputs, inputs, 1)
    return (rank * inputs, 1, inputs), (1, experts, rank * experts)


def _base_of(tensor: RemoteTensor) -> RemoteTensor:
    remote = tensor.remote.of if isinstance(tensor.remote, LateCopy) else tensor.remote
    return remote.base if isinstance(remote, View) else tensor
