"""Expert weights as parameters of the trainer, and what a forward reads off them: which adapters are on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kt_expert_client.adapter import ActiveAdapter
from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.parameters.lora import DOWN, GATE_UP, LoraMatrix, LoraPlace, matrix_of
from kt_expert_client.parameters.tensor import Product, RemoteTensor, Stored, Sum, View


class WeightSource:
    """Base weights of one projection of one layer. Implements Source."""

    def __init__(self, layer: int, parameter: str) -> None:
        self.layer, self.parameter = layer, parameter

    @property
    def name(self) -> str:
        return f"{self.parameter} of the experts of layer {self.layer}"

    def read(self) -> torch.Tensor:
        raise UnsupportedModel(f"{self.name} is on the server; reading expert weights from there is not available")

    def write(self, values: torch.Tensor) -> None:
        del values
        raise UnsupportedModel(f"{self.name} is on the server and shared by all its runs; it cannot be changed")

    def copy(self, memo: dict[int, Any]) -> WeightSource:
        """Nothing changes them, so one will do."""
        del memo
        return self

    def adopted(self, parameter: torch.Tensor) -> None:
        """Any number of parameters may stand for them."""


def make_weight(layer: int, parameter: str, shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter that stands for weights on the server."""
    source = WeightSource(layer, parameter)
    return nn.Parameter(RemoteTensor(Stored(source), torch.empty(shape, dtype=dtype, device="meta")))


def is_weight(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for weights on the server."""
    remote = tensor.remote if isinstance(tensor, RemoteTensor) else None
    return isinstance(remote, Stored) and isinstance(remote.source, WeightSource)


def adapters_on(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[tuple[ActiveAdapter, ...], list[torch.Tensor]]:
    """The adapters that are on a layer's weights, with their scales, and the parameters that the output depends on. Raises
    UnsupportedModel for anything else that was made of the weights."""
    scales: dict[str, dict[str, float]] = {}
    leaves: list[torch.Tensor] = []
    for target, weight in ((GATE_UP, gate_up), (DOWN, down)):
        base, products = _parts(target, weight)
        leaves.append(base)
        for product in products:
            place = _place_of(target, product)
            of_adapter = scales.setdefault(place.adapter, {})
            if target in of_adapter:
                raise UnsupportedModel(f"adapter {place.adapter!r} is on {target} of layer {place.layer} twice")
            of_adapter[target] = product.scale
            leaves += [_base_of(product.left), _base_of(product.right)]
    return tuple(_active(name, by_target) for name, by_target in scales.items()), leaves


def _active(name: str, scales: dict[str, float]) -> ActiveAdapter:
    """A target without a scale is switched off."""
    gate_up = scales.get(GATE_UP, 0.0)
    return ActiveAdapter(name, gate_up, gate_up, scales.get(DOWN, 0.0))


def _parts(target: str, weight: torch.Tensor) -> tuple[RemoteTensor, tuple[Product, ...]]:
    if isinstance(weight, RemoteTensor):
        remote = weight.remote
        if isinstance(remote, Sum) and remote.base is not None and is_weight(remote.base):
            return remote.base, remote.products
        if is_weight(weight):
            return weight, ()
    raise UnsupportedModel(
        f"the experts' {target} is {weight!r:.200}, expected the server's weights, alone or with LoRA on them; other changes "
        "of expert weights are not available"
    )


def _place_of(target: str, product: Product) -> LoraPlace:
    """Whose LoRA a product is. Raises UnsupportedModel where its factors are not the two matrices of one."""
    left, right = (matrix_of(_base_of(side)) for side in (product.left, product.right))
    if left is not None and right is not None:
        is_b_first = left.place.side == "B"
        a, b = (right, left) if is_b_first else (left, right)
        same = (a.place.adapter, a.place.layer, a.place.target) == (b.place.adapter, b.place.layer, b.place.target)
        if same and a.place.target == target and (a.place.side, b.place.side) == ("A", "B"):
            expected = _expected_strides(a, is_b_first=is_b_first)
            if (product.left.stride(), product.right.stride()) == expected:
                return a.place
    raise UnsupportedModel(f"what is added to the experts' {target} is not the product of LoRA's two matrices of one adapter")


def _expected_strides(a: LoraMatrix, *, is_b_first: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the views PEFT multiplies, for each expert: B A, or A^T B^T where the weight is [E, in, out]."""
    experts, rank, inputs = a.shape.experts, a.shape.rank, a.shape.inputs
    if is_b_first:
        return (1, rank * experts, experts), (rank * inputs, inputs, 1)
    return (rank * inputs, 1, inputs), (1, experts, rank * experts)


def _base_of(tensor: RemoteTensor) -> RemoteTensor:
    return tensor.remote.base if isinstance(tensor.remote, View) else tensor
