"""PEFT on models with remote experts.

PEFT itself decides what is adapted and how, and its own code runs: it wraps the experts, which hold parameters of the right
shapes, and adds products of its two matrices to them (operations.py, weights.py). All that is done here is to give the matrices
that PEFT has made and initialised to the server, one after another, and to leave remote parameters in their place.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from kt_expert_proto.lora import PARAMETER
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.integrations.experts import DOWN as DOWN_PARAMETER
from kt_expert_client.integrations.experts import GATE_UP as GATE_UP_PARAMETER
from kt_expert_client.integrations.experts import RemoteExperts, is_interleaved
from kt_expert_client.parameters.fsdp import leave_to_server
from kt_expert_client.parameters.lora import LoraMatrix, LoraShape, make_parameter
from kt_expert_client.parameters.matrix import DOWN, GATE_UP, Place
from kt_expert_client.parameters.memory import give_back
from kt_expert_client.parameters.mirror import Mirror
from kt_expert_client.parameters.moving import in_place_of, of_remote
from kt_expert_client.parameters.tensor import LateCopy, RemoteTensor, source_of
from kt_expert_client.parameters.weights import WEIGHTS_ADAPTER

_TARGETS = {GATE_UP_PARAMETER: GATE_UP, DOWN_PARAMETER: DOWN}
_SIDES = {"lora_A": "A", "lora_B": "B"}
_OTHER_SIDE = {"A": "B", "B": "A"}
_OWNER = "_kt_owner"
_SEEN = "_kt_seen"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RemoteLinear(nn.Linear):
    """The nn.Linear in which PEFT keeps a matrix, once its weight is remote: what is put in its place goes to the server."""

    def __setattr__(self, name: str, value: Any) -> None:
        current: Any = self._parameters.get(name) if name == "weight" else None
        in_place_of(value, source_of(current))
        is_copy = not isinstance(value, RemoteTensor) or isinstance(value.remote, LateCopy)
        if isinstance(current, RemoteTensor) and isinstance(value, torch.Tensor) and is_copy:
            if not value.is_meta:
                with torch.no_grad():
                    current.copy_(value)
            current.requires_grad_(value.requires_grad)
            return
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RemoteLinear:
        super()._apply(of_remote(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's name
        del input
        raise UnsupportedModel("LoRA of remote experts is computed with the experts, and not by a layer of its own")


class RemoteParamWrapper(ParamWrapper):  # type: ignore[misc]  # PEFT has no annotations
    """PEFT's wrapper of remote experts: a call to another machine is nothing to compile, nor is what PEFT prepares it with."""

    kt_mirrors: dict[tuple[str, str], Mirror]  # by adapter and side: of matrices whose parameters are here

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._kt_forward(args, kwargs, is_compiled=torch.compiler.is_compiling())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _kt_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_compiled: bool) -> Any:
        experts = self.get_base_layer()
        before, experts.kt_is_compiled = experts.kt_is_compiled, is_compiled or experts.kt_is_compiled
        try:
            return super().forward(*args, **kwargs)
        finally:
            experts.kt_is_compiled = before

    def get_delta_factors(self, adapter_name: str) -> Any:
        with self._kt_on_server(adapter_name):
            return super().get_delta_factors(adapter_name)

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        with self._kt_on_server(adapter_name):
            return super().get_delta_weight(adapter_name, *args, **kwargs)

    @contextlib.contextmanager
    def _kt_on_server(self, adapter: str) -> Iterator[None]:
        """Inside, the matrices that are here are those on the server."""
        here: list[tuple[nn.Linear, torch.Tensor]] = []
        for name, side in _SIDES.items():
            mirror = self.kt_mirrors.get((adapter, side))
            linear: nn.Linear | None = getattr(self, name)[adapter] if mirror is not None else None
            if mirror is not None and linear is not None and linear.weight is not None:
                here.append((linear, linear.weight))
                linear._parameters["weight"] = mirror.on_server(linear.weight)  # type: ignore[assignment]
        try:
            yield
        finally:
            for linear, weight in here:
                linear._parameters["weight"] = weight  # type: ignore[assignment]


RemoteParamWrapper.__name__ = ParamWrapper.__name__  # PEFT knows its wrapper by this when it wraps the next parameter


class _Owner:
    """The wrapper a dictionary of matrices belongs to. Held in a way that torch does not take for a submodule."""

    def __init__(self, wrapper: Any, side: str) -> None:
        self.wrapper, self.side = wrapper, side

    def __deepcopy__(self, memo: dict[int, Any]) -> _Owner:
        return _Owner(copy.deepcopy(self.wrapper, memo), self.side)


class Registration:
    """One hook for the whole process, through torch's own registration."""

    def __init__(self) -> None:
        self._remove: Callable[[], None] | None = None

    def install(self) -> None:
        """Does nothing where it is in place."""
        if self._remove is None:
            self._remove = register_module_module_registration_hook(_registered).remove


def give_adapters_to_server(model: nn.Module) -> None:
    """LoRA that PEFT has put on experts before they were remote: its matrices' values move to the server."""
    for wrapper in [each for each in model.modules() if isinstance(each, ParamWrapper)]:
        if _experts_of(wrapper) is None:
            continue
        _become_remote(wrapper)
        for name, side in _SIDES.items():
            matrices: nn.ModuleDict = getattr(wrapper, name)
            owner = _Owner(wrapper, side)
            object.__setattr__(matrices, _OWNER, owner)
            for adapter, linear in matrices.items():
                _give_to_server(owner, adapter, cast("nn.Linear", linear))


def _registered(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """A module has got a submodule: PEFT makes its dictionaries, then puts each matrix in, and again once it has its values."""
    if isinstance(module, ParamWrapper) and name in _SIDES and _experts_of(module) is not None:
        _become_remote(module)
        object.__setattr__(submodule, _OWNER, _Owner(module, _SIDES[name]))
    owner = getattr(module, _OWNER, None) if isinstance(module, nn.ModuleDict) else None
    if owner is None or not isinstance(submodule, nn.Linear) or isinstance(submodule, RemoteLinear):
        return
    if submodule.weight.is_meta or getattr(submodule, _SEEN, False):
        _give_to_server(owner, name, submodule)
    else:
        object.__setattr__(submodule, _SEEN, True)


def _become_remote(wrapper: ParamWrapper) -> None:
    if not isinstance(wrapper, RemoteParamWrapper):
        wrapper.__class__ = RemoteParamWrapper
        wrapper.kt_mirrors = {}


def _experts_of(wrapper: nn.Module) -> Any:
    module: Any = wrapper
    while isinstance(module, ParamWrapper):
        module = module._modules["base_layer"]
    return module if isinstance(module, RemoteExperts) and module.kt_offload is not None else None


def _give_to_server(owner: _Owner, adapter: str, linear: nn.Linear) -> None:
    wrapper, experts = owner.wrapper, _experts_of(owner.wrapper)
    if wrapper.parameter_name not in _TARGETS:
        raise UnsupportedModel(f"LoRA on the experts' {wrapper.parameter_name} is not available; target {sorted(_TARGETS)}")
    count, rank = experts.kt_shapes[wrapper.parameter_name][0], wrapper.r[adapter]
    # PEFT before 0.19 takes the middle of [E, out, in] for the inputs.
    swapped = not experts.is_transposed and not getattr(wrapper, "_did_swap_in_out_features", False)
    side = _OTHER_SIDE[owner.side] if swapped else owner.side
    inputs, outputs = wrapper.in_features, wrapper.out_features
    if swapped:
        inputs, outputs = outputs, inputs
    shape = LoraShape(count, rank, inputs, outputs, is_interleaved(experts), swapped)
    place = Place(server_name(adapter), experts.kt_layer.layer, _TARGETS[wrapper.parameter_name], side)
    store, weight = experts.kt_offload.parameters, linear.weight
    if experts.kt_offload.options.lora_location == "trainer":
        wrapper.kt_mirrors[adapter, owner.side] = Mirror(store, place, shape)
        return
    matrix = store.make(LoraMatrix(store, place, shape))
    if not weight.is_meta and place.layer not in store.kept_layers(place.adapter):
        matrix.write(weight.detach(), PARAMETER)
    parameter = make_parameter(matrix, weight, requires_grad=weight.requires_grad)
    store.gradients.add(matrix, parameter)
    linear.__class__ = RemoteLinear
    leave_to_server(linear)
    linear._parameters["weight"] = parameter
    size = weight.nbytes
    del weight
    give_back(size)


def server_name(adapter: str) -> str:
    """PEFT's adapters have any name; the server's are letters, digits, dots and dashes, and one is that of trained weights."""
    if _NAME.fullmatch(adapter) and adapter != WEIGHTS_ADAPTER:
        return adapter
    return f"adapter-{hashlib.sha256(adapter.encode()).hexdigest()[:16]}"
