"""Casts and moves of modules: remote parameters look as if they had another dtype or device, and stay where they are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kt_expert_client.parameters.tensor import LateCopy, RemoteTensor, source_of


def in_place_of(parameter: object, current: object = None) -> bool:
    """A cast or a move of a parameter that stands in the parameter's own place, as PEFT and accelerate put it there, is the
    parameter itself. Returns whether it is; `current` is what stood there, if that is known."""
    if not isinstance(parameter, torch.nn.Parameter) or not isinstance(parameter, RemoteTensor):
        return False
    remote = parameter.remote
    if not isinstance(remote, LateCopy) or not remote.is_unread or source_of(parameter) is None:
        return False
    if current is not None and source_of(current) is not source_of(parameter):
        return False
    parameter.remote = remote.of
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
