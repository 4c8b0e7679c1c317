"""Experts modules without weights: subclasses of transformers' own classes that send their batches to the server."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import nn

from kt_expert_client.autograd import ExpertsCall, ExpertsFunction
from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.offload import LocalLayerSpec, ModelOffload, OffloadedLayer
from kt_expert_client.parameters.active import adapters_on
from kt_expert_client.parameters.fsdp import leave_to_server
from kt_expert_client.parameters.moving import in_place_of, of_remote
from kt_expert_client.parameters.tensor import source_of
from kt_expert_client.parameters.weights import WeightShape, make_weight
from kt_expert_client.pending import can_wait_later, experts_output
from kt_expert_client.routing import routed
from kt_expert_client.weight_layout import WeightLayout

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_SILU_NAMES = {"SiLU", "SiLUActivation"}
_GPT_OSS_CLASS = "GptOssExperts"
GATE_UP = "gate_up_proj"
DOWN = "down_proj"
_LARGEST_SEED = (1 << 63) - 1
_INPUT_NAMES = (
    ("hidden_states",),
    ("top_k_index", "router_indices", "selected_experts"),
    ("top_k_weights", "routing_weights"),
)


class RemoteExperts(nn.Module):
    """Mixin in front of a stock experts class. It has no parameters until it is connected, and remote ones from then on."""

    kt_shapes: dict[str, tuple[int, ...]]
    kt_dtype: torch.dtype
    kt_frozen: set[str]
    kt_layer: OffloadedLayer | None
    kt_offload: ModelOffload | None
    kt_is_compiled = False  # while a wrapper around it is called from compiled code
    kt_meanwhile: Callable[[], None] | None = None  # to be done once while the server computes

    def kt_strip(self) -> None:
        """Records the parameters' shapes and drops them."""
        parameters = dict(self.named_parameters(recurse=False))
        self.kt_shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.kt_frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
        self.kt_dtype = next((parameter.dtype for parameter in parameters.values()), torch.float32)
        for name in parameters:
            self._parameters.pop(name)
        self.kt_layer = None
        self.kt_offload = None
        self._is_hf_initialized = True  # keeps _init_weights from initialising parameters that are not there

    def kt_connect(self, layer: OffloadedLayer, offload: ModelOffload, dtype: torch.dtype) -> None:
        """From now on its weights are those of that layer on the server."""
        self.kt_layer, self.kt_offload = layer, offload
        leave_to_server(self)
        module: Any = self
        spec = local_spec(f"layers.{layer.layer}", self)
        layout = WeightLayout(bool(module.is_transposed), interleaved=is_interleaved(module))
        sizes = WeightShape(spec.num_experts, spec.hidden_size, spec.intermediate_size, layout)
        for name, shape in self.kt_shapes.items():
            geometry = torch.empty(shape, dtype=dtype, device="meta")
            made = make_weight(offload.parameters.weights, layer.layer, name, geometry, sizes)
            made.requires_grad_(name not in self.kt_frozen)
            self.register_parameter(name, made)

    def kt_weights(self) -> list[nn.Parameter]:
        """Its weights and biases, whether or not they are parametrized at the moment."""
        return [parameter for _, parameter in self.named_parameters()]

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteExperts:
        """A copy talks to the same server through the same run."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __setattr__(self, name: str, value: Any) -> None:
        in_place_of(value, source_of(self.__dict__.get("_parameters", {}).get(name)))
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RemoteExperts:
        super()._apply(of_remote(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(hidden_states [T, H], expert ids [T, k], routing weights [T, k]) -> [T, H], by position or by stock names. The
        output waits for the server at its first use."""
        output: torch.Tensor = self._kt_forward(args, kwargs, at_once=torch.compiler.is_compiling())
        return output

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a call to another machine is nothing to compile
    def _kt_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, at_once: bool) -> torch.Tensor:
        """`at_once`: compiled code takes the output, which has to be a plain tensor."""
        hidden_states, expert_ids, routing_weights = self._kt_inputs(args, kwargs)
        layer, offload = self.kt_layer, self.kt_offload
        if layer is None or offload is None:
            raise UnsupportedModel(
                "this model was built without expert weights and is not connected to a server; call "
                "kt_expert_client.attach(model)"
            )
        biases = [getattr(self, name) for name in self.kt_shapes if name not in (GATE_UP, DOWN)]
        adapters, leaves = adapters_on(layer.layer, getattr(self, GATE_UP), getattr(self, DOWN), biases)
        if offload.ddp_parameter is not None:
            leaves.append(offload.ddp_parameter)
        expert_ids, routing_weights = routed(layer.layer, expert_ids, routing_weights)
        inputs = [hidden_states, routing_weights, *leaves]
        meanwhile, self.kt_meanwhile = self.kt_meanwhile, None
        call = ExpertsCall(
            expert_ids,
            adapters,
            torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs),
            draw_dropout_seed() if self.training and offload.options.dropout > 0 else 0,
            meanwhile,
        )
        if can_wait_later() and not (at_once or self.kt_is_compiled):
            return experts_output(hidden_states, routing_weights, layer, call, leaves)
        output: torch.Tensor = ExpertsFunction.apply(  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            hidden_states, routing_weights, layer, call, *leaves
        )
        return output

    @staticmethod
    def _kt_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states, expert ids and routing weights, by position or by any of the names stock classes give them."""
        given = list(args)
        for names in _INPUT_NAMES[len(given) :]:
            found = [kwargs.pop(name) for name in names if name in kwargs]
            if len(found) != 1:
                raise TypeError(
                    f"experts take hidden_states, expert ids and routing weights; got {sorted(kwargs)} beside {len(args)}"
                )
            given.append(found[0])
        hidden_states, expert_ids, routing_weights = given[:3]
        return hidden_states, expert_ids, routing_weights


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


def loaded_experts_classes() -> list[tuple[ModuleType, str, type[nn.Module]]]:
    """Experts classes of all modeling modules imported so far: the module, the class's name in it, and the class."""
    return [
        (module, name, candidate)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("transformers.models.") and ".modeling_" in module_name
        for name, candidate in list(vars(module).items())
        if is_experts_class(candidate)
    ]


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


def is_interleaved(module: Any) -> bool:
    """Whether gate and up take turns in its gate_up. transformers before 5.16 does not say it of a class: gpt-oss's do."""
    stock: Any = type(module).__mro__[2]
    return not getattr(module, "is_concatenated", stock.__name__ != _GPT_OSS_CLASS)


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
