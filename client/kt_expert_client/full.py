"""Experts that are trained in full: all of a model's, or those of some layers beside LoRA or frozen ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kt_expert_client.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import nn


def train_in_full(model: nn.Module, layers: Iterable[int] | None = None) -> list[nn.Parameter]:
    """Sets requires_grad on the expert weights of these layers, by default of all, and has the server reserve at once what
    their training takes: fp32 masters, gradients and moments. Returns the parameters, for an optimizer.

    requires_grad_(True) alone does the same, but for the memory, which is then reserved by the first backward. Call it after
    get_peft_model, which freezes all weights. Raises InvalidRequest for a layer without remote experts, and OutOfCapacity with
    nothing changed.
    """
    from kt_expert_client.integrations.experts import RemoteExperts

    found = {
        each.kt_layer.layer: each for each in model.modules() if isinstance(each, RemoteExperts) and each.kt_layer is not None
    }
    wanted = sorted(found if layers is None else set(layers))
    missing = [layer for layer in wanted if layer not in found]
    if missing or not found:
        raise InvalidRequest(f"layers {missing} have no experts on a server; those that have: {sorted(found) or 'none'}")
    offload = found[wanted[0]].kt_offload
    assert offload is not None  # noqa: S101  # such modules are connected
    offload.parameters.weights.own_all(wanted)
    trained = [parameter for layer in wanted for parameter in found[layer].kt_weights()]
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained
