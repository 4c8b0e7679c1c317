"""LoRA whose parameters are the trainer's own: with lora_location="trainer" the server gets their values before it computes
with them, and gives each pass's gradients back to autograd. Whatever torch does to a tensor, and every optimizer, works."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from kt_expert_proto.lora import GRADIENT

from kt_expert_client.parameters.lora import LoraMatrix, LoraShape
from kt_expert_client.parameters.matrix import ParameterSource, Place
from kt_expert_client.parameters.tensor import RemoteTensor, Stored

if TYPE_CHECKING:
    from kt_expert_client.parameters.store import ParameterStore


class MirrorMatrix(LoraMatrix):
    """A matrix on the server that follows a parameter here. Its gradient there is that of one pass alone."""

    def gradient(self, like: torch.Tensor) -> torch.Tensor:
        """Of the pass that was just made: this member's own, as autograd and DDP expect it."""
        return self.read(GRADIENT).to(device=like.device, dtype=like.dtype)


class Mirror:
    """One matrix's two forms. The server's is made when it is first needed."""

    def __init__(self, store: ParameterStore, place: Place, shape: LoraShape, *, is_copy: bool = False) -> None:
        self._is_copy = is_copy
        self._store, self._place, self._shape = store, place, shape
        self._there: RemoteTensor | None = None
        self._sent: torch.Tensor | None = None  # what the server has: writes through .data leave no other trace

    def __deepcopy__(self, memo: dict[int, Any]) -> Mirror:
        name, _ = self._store.name_in_copy(self._place.adapter, memo)
        copied = Mirror(self._store, replace(self._place, adapter=name), self._shape, is_copy=True)
        memo[id(self)] = copied
        return copied

    def on_server(self, parameter: torch.Tensor) -> torch.Tensor:
        """The parameter as the server has it, for autograd a copy. Sends its values where they have changed."""
        made: torch.Tensor = _OnServer.apply(parameter, self)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return made

    def send(self, parameter: torch.Tensor) -> RemoteTensor:
        """A tensor that stands for the values, once the server has them."""
        values = parameter.detach()
        there = self._there
        if there is None:
            matrix = self._store.make(MirrorMatrix(self._store, self._place, self._shape))
            if self._is_copy:
                self._store.hold(matrix)
            geometry = torch.empty(matrix.size, dtype=values.dtype, device="meta")
            there = self._there = RemoteTensor(Stored(ParameterSource(matrix)), geometry)
            self._store.gradients.add(matrix, there)
        sent = self._sent
        if sent is None or sent.device != values.device or not torch.equal(sent, values):
            there.remote.source.write(values)  # type: ignore[union-attr]  # it is Stored
            self._sent = values.clone()
        made: RemoteTensor = RemoteTensor(there.remote, there, dtype=values.dtype, device=values.device)
        return made


class _OnServer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, mirror: Mirror) -> torch.Tensor:
        del ctx
        return mirror.send(parameter)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        del ctx
        return grad_outputs[0], None
