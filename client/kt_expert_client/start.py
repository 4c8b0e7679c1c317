"""The high-level ways in. transformers and PEFT are imported only when one of them is used."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from kt_expert_client.integrations.lora_experts import LoraExperts
    from kt_expert_client.offload import ModelOffload
    from kt_expert_client.options import RunOptions

SERVER_VARIABLE = "KT_EXPERT_SERVER"


def offload_experts(address: str, options: RunOptions | None = None) -> AbstractContextManager[None]:
    """Models loaded inside the block (``from_pretrained``, ``from_config``) get their experts from `address`.

    They stay connected afterwards. `options` defaults to RunOptions.from_environment(). Raises
    ServerUnavailable where nothing answers, WrongPhase where the server has loaded another model.
    """
    from kt_expert_client.integrations.transformers import offload_experts as offload

    return offload(address, options)


def attach(model: nn.Module, address: str | None = None, options: RunOptions | None = None) -> ModelOffload:
    """Connects a model of your own making; `address` defaults to KT_EXPERT_SERVER, `options` as for offload_experts.

    Experts that hold weights lose them. Raises InvalidRequest without an address, UnsupportedModel for a model without
    offloadable experts.
    """
    from kt_expert_client.integrations.transformers import attach as attach_model

    return attach_model(model, address, options)


def add_lora_experts(
    model: nn.Module, number: int = 2, intermediate_size: int = 1024, layers: Iterable[int] | None = None
) -> list[LoraExperts]:
    """Gives mixture-of-experts blocks small extra experts on the trainer's own device, beside those on the server.

    Their mean is added to the block's output; it begins at zero. Call it before get_peft_model, whose configuration then names
    them: LoraConfig(modules_to_save=["lora_experts"], ...). Raises InvalidRequest.
    """
    from kt_expert_client.integrations.lora_experts import add_lora_experts as add

    return add(model, number, intermediate_size, layers)


def enable_from_environment() -> None:
    """With KT_EXPERT_SERVER=host:port set, every model this process loads is offloaded."""
    address = os.environ.get(SERVER_VARIABLE)
    if address:
        from kt_expert_client.integrations.transformers import enable

        enable(address)


def close_at_exit() -> None:
    """Leaves runs when the process ends, so that the server frees them at once and not when their leases run out."""
    import sys

    module = sys.modules.get("kt_expert_client.integrations.transformers")
    if module is not None:
        module.OFFLOADER.close()


atexit.register(close_at_exit)
