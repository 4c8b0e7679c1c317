"""Operations without a meaning of their own on the server: computed here, from values that are read for them.

Where an operation changes an argument, the schema of the operation says so, and the changed values are written back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.parameters.tensor import RemoteTensor, View


def compute_here(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on plain tensors. Raises UnsupportedModel for one that needs memory that is not here."""
    if func.namespace not in ("aten", "prims", "_c10d_functional"):
        raise UnsupportedModel(
            f"{func} needs a tensor in this process's memory, and {_first(args).describe()} is on the server; read it first "
            "(.detach().cpu()), or train with lora_location='trainer'"
        )
    local: dict[int, torch.Tensor] = {}

    def bring(tensor: RemoteTensor) -> torch.Tensor:
        if id(tensor) not in local:
            local[id(tensor)] = tensor.values().clone().to(tensor.device)
        return local[id(tensor)]

    plain_args, plain_kwargs = tree_map_only(RemoteTensor, bring, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    changed = _changed_arguments(func, args, kwargs)
    for tensor in changed:
        _write_back(tensor, local[id(tensor)])
    by_copy = {id(copy): tensor for tensor in changed for copy in (local[id(tensor)],)}
    # What was changed in place is what the caller gets back, and not the copy of it.
    return tree_map_only(torch.Tensor, lambda tensor: by_copy.get(id(tensor), tensor), result)


def _first(args: tuple[Any, ...]) -> RemoteTensor:
    found: list[RemoteTensor] = []
    tree_map_only(RemoteTensor, found.append, args)
    return found[0]


def _changed_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[RemoteTensor]:
    """Remote tensors that the operation's schema says it writes."""
    changed: list[RemoteTensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[index] if index < len(args) else kwargs.get(argument.name)
        for each in given if isinstance(given, list | tuple) else [given]:
            if isinstance(each, RemoteTensor):
                changed.append(each)
    return changed


def _write_back(tensor: RemoteTensor, values: torch.Tensor) -> None:
    remote = tensor.remote
    if not isinstance(remote, View):
        tensor.write(values)
        return
    whole = remote.base.laid_out().clone()
    remote.of(whole).copy_(values)
    remote.base.write(whole)
