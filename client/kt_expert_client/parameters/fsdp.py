"""FSDP2 passes modules over whose parameters another distributed API of torch's has: that is what modules with remote
parameters say of themselves, since the server averages their gradients over the ranks."""

from __future__ import annotations

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, RegistryItem

_OTHER_API = "replicate"  # the one that fully_shard looks for


def leave_to_server(module: nn.Module) -> None:
    """fully_shard, on whatever module around it, does not shard this one's parameters."""
    object.__setattr__(module, REGISTRY_KEY, {_OTHER_API: RegistryItem()})
