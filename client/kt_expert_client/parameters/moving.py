"""Casts and moves of modules: remote parameters look as if they had another dtype or device, and stay where they are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kt_expert_client.parameters.tensor import LateCopy, RemoteTensor, Source, Stored, source_behind


def in_place_of(parameter: object, source: Source | None) -> bool:
    """A cast or a move of a parameter that stands in the parameter's own place, as PEFT and accelerate put it there, is the
    parameter itself. Returns whether it is; `source` is what stood there."""
    if not isinstance(parameter, torch.nn.Parameter) or not isinstance(parameter, RemoteTensor):
        return False
    if source is None or not isinstance(parameter.remote, LateCopy) or source_behind(parameter) is not source:
        return False
    parameter.remote = Stored(source)
    return True


def of_remote(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """For Module._apply: `change` as it is for plain tensors; remote ones become what it makes of an empty one."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, RemoteTensor):
            return change(tensor)
        probe = change(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        if (probe.dtype, probe.device) == (tensor.dtype, tensor.device):
            return tensor
        made: RemoteTensor = RemoteTensor(tensor.remote, tensor, dtype=probe.dtype, device=probe.device)
        return made

    return changed
