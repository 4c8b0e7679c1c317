"""Experts modules without weights: subclasses of transformers' own classes that send their batches to the server."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kt_expert_client.autograd import ExpertsFunction
from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.offload import LocalLayerSpec, ModelOffload, OffloadedLayer

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SILU_NAMES = {"SiLU", "SiLUActivation"}
_GPT_OSS_CLASS = "GptOssExperts"
GATE_UP = "gate_up_proj"
DOWN = "down_proj"
_LARGEST_SEED = (1 << 63) - 1


class RemoteExperts(nn.Module):
    """Mixin in front of a stock experts class. Its parameters exist as shapes only."""

    kt_shapes: dict[str, tuple[int, ...]]
    kt_dtype: torch.dtype
    kt_layer: OffloadedLayer | None
    kt_offload: ModelOffload | None

    def kt_strip(self) -> None:
        """Records the parameters' shapes and drops them."""
        parameters = dict(self.named_parameters(recurse=False))
        self.kt_shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.kt_dtype = next((parameter.dtype for parameter in parameters.values()), torch.float32)
        for name in parameters:
            self._parameters.pop(name)
        self.kt_layer = None
        self.kt_offload = None
        self._is_hf_initialized = True  # keeps _init_weights from initialising parameters that are not there

    def kt_add_placeholders(self, dtype: torch.dtype) -> None:
        """Parameters of the right shape that share one element, so that PEFT can find and wrap them."""
        for name, shape in self.kt_shapes.items():
            placeholder = torch.zeros(1, dtype=dtype).expand(shape)
            self.register_parameter(name, nn.Parameter(placeholder, requires_grad=False))

    def kt_drop_placeholders(self) -> None:
        for name in self.kt_shapes:
            self._parameters.pop(name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteExperts:
        """A copy talks to the same server through the same run."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a call to another machine is nothing to compile
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(hidden_states [T, H], expert ids [T, k], routing weights [T, k]) -> [T, H], by position or by stock names."""
        hidden_states, expert_ids, routing_weights = (*args, *kwargs.values())[:3]
        layer, offload = self.kt_layer, self.kt_offload
        if layer is None or offload is None:
            raise UnsupportedModel(
                "this model was built without expert weights and is not connected to a server; call "
                "kt_expert_client.attach(model)"
            )
        anchor = offload.anchor.weight if offload.anchor is not None else None
        needs_grad = hidden_states.requires_grad or routing_weights.requires_grad
        needs_grad = needs_grad or (anchor is not None and anchor.requires_grad)
        switch = getattr(self, "kt_switch", None)
        output: torch.Tensor = ExpertsFunction.apply(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            hidden_states,
            routing_weights,
            anchor,
            expert_ids,
            layer,
            torch.is_grad_enabled() and needs_grad,
            switch is None or switch.kt_adapter_on,
            draw_dropout_seed() if self.training and offload.options.dropout > 0 else 0,
        )
        return output


def draw_dropout_seed() -> int:
    """From torch's own generator, which torch.manual_seed sets and which checkpointing winds back for a recompute."""
    return int(torch.randint(1, _LARGEST_SEED, (), dtype=torch.int64))


def is_experts_class(candidate: object) -> bool:
    """True for the classes transformers decorates with use_experts_implementation."""
    return (
        isinstance(candidate, type)
        and issubclass(candidate, nn.Module)
        and candidate.__name__.endswith("Experts")
        and hasattr(candidate, "_apply_gate")
        and not issubclass(candidate, RemoteExperts)
    )


def loaded_experts_classes() -> Iterator[tuple[str, type[nn.Module]]]:
    """Experts classes of all modeling modules imported so far."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.models.") and ".modeling_" in module_name:
            for name, candidate in list(vars(module).items()):
                if is_experts_class(candidate) and candidate.__module__ == module_name:
                    yield name, candidate


def restore_stock_classes() -> None:
    """Puts the library's own classes back: its replacement leaves ours in place where building a model fails."""
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("transformers.models.") and ".modeling_" in module_name:
            for name, candidate in list(vars(module).items()):
                if isinstance(candidate, type) and issubclass(candidate, RemoteExperts):
                    setattr(module, name, candidate.__mro__[2])


_REMOTE_CLASSES: dict[type[nn.Module], type[RemoteExperts]] = {}


def remote_class(stock: type[nn.Module]) -> type[RemoteExperts]:
    """A subclass of `stock` that never holds weights; isinstance checks of the library keep working."""
    if stock in _REMOTE_CLASSES:
        return _REMOTE_CLASSES[stock]

    class Remote(RemoteExperts, stock):  # type: ignore[misc, valid-type]  # the base is only known at run time
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            with torch.device("meta"):
                stock.__init__(self, *args, **kwargs)
            self.kt_strip()

        def __reduce__(self) -> Any:
            raise UnsupportedModel("a model with offloaded experts cannot be pickled; save its adapter instead")

    Remote.__name__ = Remote.__qualname__ = f"Remote{stock.__name__}"
    _REMOTE_CLASSES[stock] = Remote
    return Remote


def convert_in_place(module: nn.Module) -> RemoteExperts:
    """Turns an experts module that was built with weights into a remote one and frees the weights."""
    module.__class__ = remote_class(type(module))
    remote: Any = module
    remote.kt_strip()
    converted: RemoteExperts = remote
    return converted


def layer_index(name: str) -> int:
    """The checkpoint's layer number in a module path."""
    match = _LAYER.search(name + ".")
    if match is None:
        raise UnsupportedModel(f"experts module {name!r} is in no numbered layer")
    return int(match[1])


def local_spec(name: str, module: Any) -> LocalLayerSpec:
    """Reads sizes and activation off a remote module. Raises UnsupportedModel for a form the engine lacks."""
    shapes = module.kt_shapes
    unsupported = not module.has_gate or getattr(module, "has_post_expert_norm", False)
    if unsupported or GATE_UP not in shapes or DOWN not in shapes:
        raise UnsupportedModel(f"{type(module).__name__} ({name}) has parameters {sorted(shapes)}; expected gate_up and down")
    experts, first, second = shapes[DOWN]
    intermediate, hidden = (first, second) if module.is_transposed else (second, first)
    activation, alpha, limit = _activation(name, module)
    return LocalLayerSpec(layer_index(name), experts, hidden, intermediate, activation, alpha, limit, bool(module.has_bias))


def _activation(name: str, module: Any) -> tuple[str, float, float]:
    stock: Any = type(module).__mro__[2]
    if stock.__name__ == _GPT_OSS_CLASS:
        return "gpt_oss", float(module.alpha), float(module.limit)
    act = type(getattr(module, "act_fn", None)).__name__
    if act not in _SILU_NAMES or stock._apply_gate.__qualname__ != "_default_apply_gate":
        raise UnsupportedModel(f"{stock.__name__} ({name}) gates with {act}; the engine has silu and gpt-oss's clamped swiglu")
    return "silu", 1.0, 0.0
