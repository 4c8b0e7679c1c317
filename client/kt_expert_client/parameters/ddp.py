"""DistributedDataParallel passes remote parameters over: the server averages their gradients over the ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import nn

from kt_expert_client.parameters.tensor import RemoteTensor

# Where the model is inside what DDP is given: itself, or in PEFT's wrappers.
_PREFIXES = ("", "base_model.model.")
PARAMETER_NAME = "kt_ddp"


class NamesForDdp:
    """The names of a model's remote parameters at the time DDP asks for them: adapters come and go.

    DDP refuses a model without a trainable parameter of its own. Where the experts' are the only ones, the model gets one of
    one element, whose gradient is zero; `use` is told of it.
    """

    def __init__(self, model: nn.Module, use: Callable[[nn.Parameter], None]) -> None:
        self._model = weakref.ref(model)
        self._use = use

    def __iter__(self) -> Iterator[str]:
        model = self._model()
        if model is None:
            return
        named = list(model.named_parameters())
        trainable = [parameter for _, parameter in named if parameter.requires_grad]
        if trainable and all(isinstance(parameter, RemoteTensor) for parameter in trainable):
            device = next((each.device for _, each in named if not isinstance(each, RemoteTensor)), torch.device("cpu"))
            made = nn.Parameter(torch.zeros(1, device=device))
            model.register_parameter(PARAMETER_NAME, made)
            self._use(made)
        for name, parameter in named:
            if isinstance(parameter, RemoteTensor):
                yield from (prefix + name for prefix in _PREFIXES)
