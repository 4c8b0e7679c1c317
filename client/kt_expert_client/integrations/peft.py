"""PEFT on models with remote experts.

PEFT itself decides what is adapted and how: while it works, the remote experts carry placeholder parameters of the right
shape, so its own matching, wrapping, initialisation and file format apply unchanged. Afterwards its wrappers are taken
out of the model and their tensors live on the server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from kt_expert_client import peft_layout
from kt_expert_client.adapter import AdapterTensors, LayerLora, TensorKey
from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.integrations import moments_file
from kt_expert_client.integrations.experts import DOWN, GATE_UP, RemoteExperts
from kt_expert_client.offload import ModelOffload, OptimizerHook

ANCHOR_MODULE = "kt_anchor"
_SWITCH_MODULE = "kt_switch"


class AdapterSwitch(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT has no annotations
    """Hears PEFT's enable and disable calls for one remote experts module. Holds no parameters."""

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, adapter_name: str) -> None:
        super().__init__()
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        self.merged_adapters: list[str] = []
        self._adapter_name = adapter_name

    @property
    def kt_adapter_on(self) -> bool:
        return not self._disable_adapters and self._adapter_name in self._active_adapter

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        del inference_mode
        self._active_adapter = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """The anchor carries requires_grad for the whole adapter."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """There is nothing here to move."""

    def delete_adapter(self, adapter_name: str) -> None:
        raise UnsupportedModel(f"adapter {adapter_name!r} lives on the server and ends with its run")


@dataclass
class _AdaptedLayer:
    """One remote experts module with the wrappers PEFT put around it, outermost first; none where not targeted."""

    layer: int
    module: Any  # RemoteExperts and its stock class
    parent: nn.Module
    attribute: str
    wrappers: list[ParamWrapper]

    def wrap(self) -> None:
        if self.wrappers:
            setattr(self.parent, self.attribute, self.wrappers[0])

    def unwrap(self) -> None:
        setattr(self.parent, self.attribute, self.module)


class RemoteAdapter:
    """The expert part of one PEFT adapter."""

    def __init__(self, model: PeftModel, offload: ModelOffload, adapter_name: str) -> None:
        self._model = model
        self._offload = offload
        self._name = adapter_name
        self._layers = [_find_layer(model, module) for module in _remote_modules(model)]
        tensors = self._take_tensors()
        self.parameter_count = sum(tensor.numel() for tensor in tensors.values())
        self._install(tensors)

    @contextlib.contextmanager
    def materialised(self, *, upload: bool) -> Iterator[None]:
        """Inside, the model looks to PEFT as if its expert LoRA were local. With `upload`, changes go to the server."""
        tensors = {} if upload else self._offload.download()
        try:
            for layer in self._layers:
                layer.module.kt_add_placeholders(self._dtype(layer))
                self._give_tensors(layer, tensors)
                layer.wrap()
            yield
            if upload:
                self._offload.upload(self._collect())
        finally:
            self._take_out()

    def _install(self, tensors: AdapterTensors) -> None:
        lora = [_layer_lora(layer, self._name, self._offload.options.dropout) for layer in self._layers if layer.wrappers]
        if not lora:
            return
        device = next((p.device for p in self._model.parameters() if p.requires_grad), torch.device("cpu"))
        anchor = self._offload.set_adapter(lora, tensors, device)
        setattr(self._model, ANCHOR_MODULE, anchor)
        anchor.weight.requires_grad_(not self._model.peft_config[self._name].inference_mode)
        self._spare_ddp_the_anchor()
        for layer in self._layers:
            if layer.wrappers:
                setattr(layer.module, _SWITCH_MODULE, AdapterSwitch(self._name))

    def _spare_ddp_the_anchor(self) -> None:
        """Its gradient is the same on every rank already. DDP wants at least one parameter, so it keeps the only one."""
        others = any(p.requires_grad for name, p in self._model.named_parameters() if not name.startswith(ANCHOR_MODULE))
        if others:
            ignored = list(getattr(self._model, "_ddp_params_and_buffers_to_ignore", []))
            self._model._ddp_params_and_buffers_to_ignore = [*ignored, f"{ANCHOR_MODULE}.weight"]

    def _take_tensors(self) -> AdapterTensors:
        tensors = self._collect()
        self._take_out()
        return tensors

    def _take_out(self) -> None:
        """PEFT's wrappers leave the model, keep their shapes, and hold no memory."""
        for layer in self._layers:
            layer.unwrap()
            layer.module.kt_drop_placeholders()
            _shrink(layer, self._name)

    def _collect(self) -> AdapterTensors:
        tensors: AdapterTensors = {}
        for layer in self._layers:
            for wrapper in layer.wrappers:
                a, b = wrapper.lora_A[self._name].weight.data, wrapper.lora_B[self._name].weight.data
                if a.device.type != "meta":  # low_cpu_mem_usage: the values come with load_adapter
                    tensors |= _to_server(layer, wrapper.parameter_name, a, b)
        return tensors

    def _give_tensors(self, layer: _AdaptedLayer, tensors: AdapterTensors) -> None:
        for wrapper in layer.wrappers:
            for part, side in (("A", wrapper.lora_A), ("B", wrapper.lora_B)):
                weight = side[self._name].weight
                value = _to_peft(layer, wrapper.parameter_name, part, tensors) if tensors else None
                _replace_weight(side[self._name], torch.zeros(weight.shape) if value is None else value)

    def _dtype(self, layer: _AdaptedLayer) -> torch.dtype:
        fallback: torch.dtype = layer.module.kt_dtype
        return next((p.dtype for p in self._model.parameters() if p.is_floating_point()), fallback)


def install(hook: OptimizerHook) -> None:
    """Teaches PeftModel about remote experts, once per process."""
    if getattr(PeftModel.__init__, "kt_expert", False):
        return
    original = PeftModel.__init__

    def init(self: PeftModel, model: nn.Module, peft_config: Any, adapter_name: str = "default", **kwargs: Any) -> None:
        modules = _remote_modules(model)
        if not modules:
            original(self, model, peft_config, adapter_name, **kwargs)
            return
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        for module in modules:
            module.kt_add_placeholders(dtype)
        try:
            original(self, model, peft_config, adapter_name, **kwargs)
        except BaseException:
            for module in modules:
                module.kt_drop_placeholders()
            raise
        offload: ModelOffload = modules[0].kt_offload
        adapter = RemoteAdapter(self, offload, adapter_name)
        hook.watch(offload)
        _override_methods(self, adapter, offload, adapter_name)

    init.kt_expert = True  # type: ignore[attr-defined]  # marks the replacement
    PeftModel.__init__ = init


def _override_methods(model: PeftModel, adapter: RemoteAdapter, offload: ModelOffload, name: str) -> None:
    """Instance-level overrides: saving, loading, counting and what cannot be done with experts elsewhere."""
    model.save_pretrained = _saving(model, adapter)
    model.load_adapter = _loading(model, adapter, offload, name)
    count = model.get_nb_trainable_parameters

    def get_nb_trainable_parameters() -> tuple[int, int]:
        trainable, total = count()
        anchor = sum(1 for parameter_name, _ in model.named_parameters() if parameter_name.startswith(ANCHOR_MODULE))
        return trainable + adapter.parameter_count - anchor, total + adapter.parameter_count - anchor

    model.get_nb_trainable_parameters = get_nb_trainable_parameters
    for method in ("merge_and_unload", "merge_adapter", "unload"):
        setattr(model, method, _refusing(method))


def _saving(model: PeftModel, adapter: RemoteAdapter) -> Callable[..., Any]:
    save = model.save_pretrained

    def save_pretrained(save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("is_main_process", True):
            return None
        with adapter.materialised(upload=False):
            state = kwargs.get("state_dict")
            if state is not None:
                expert_state = {k: v for k, v in model.state_dict().items() if ".experts." in k and "lora_" in k}
                kwargs["state_dict"] = {**state, **expert_state}
            return save(save_directory, *args, **kwargs)

    return save_pretrained


def _loading(model: PeftModel, adapter: RemoteAdapter, offload: ModelOffload, name: str) -> Callable[..., Any]:
    load = model.load_adapter

    def load_adapter(model_id: Any, adapter_name: str = name, *args: Any, **kwargs: Any) -> Any:
        if adapter_name != name:
            raise UnsupportedModel(
                f"adapter {adapter_name!r} cannot be added: one adapter per run, and this one is {name!r}; load it under "
                "that name, or load a second model"
            )
        with adapter.materialised(upload=True):
            result = load(model_id, adapter_name, *args, **kwargs)
        # All ranks come here, and rank 0's file decides: the others' disks may lack it.
        moments = moments_file.read(Path(str(model_id)))
        offload.upload(moments.tensors if moments else {}, step=moments.step if moments else None)
        return result

    return load_adapter


def _refusing(method: str) -> Callable[..., None]:
    def refused(*args: Any, **kwargs: Any) -> None:
        del args, kwargs
        raise UnsupportedModel(
            f"{method} needs the expert weights, which are on the server; save the adapter and merge it where they are"
        )

    return refused


def _remote_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, RemoteExperts)]


def _find_layer(model: nn.Module, module: Any) -> _AdaptedLayer:
    path = next(name for name, candidate in model.named_modules() if candidate is module)
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    parent_path, _, attribute = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    wrappers, current = [], getattr(parent, attribute)
    while isinstance(current, ParamWrapper):
        wrappers.append(current)
        current = current.base_layer
    known = {GATE_UP, DOWN}
    for wrapper in wrappers:
        if wrapper.parameter_name not in known:
            raise UnsupportedModel(
                f"LoRA on {path}.{wrapper.parameter_name} is not available; target {sorted(known)} of the experts"
            )
    return _AdaptedLayer(module.kt_layer.layer, module, parent, attribute, wrappers)


def _layer_lora(layer: _AdaptedLayer, adapter: str, dropout: float) -> LayerLora:
    rank, scale = {GATE_UP: 0, DOWN: 0}, {GATE_UP: 0.0, DOWN: 0.0}
    for wrapper in layer.wrappers:
        rank[wrapper.parameter_name] = wrapper.r[adapter]
        scale[wrapper.parameter_name] = wrapper.scaling[adapter]
    ranks, scales = (rank[GATE_UP], rank[GATE_UP], rank[DOWN]), (scale[GATE_UP], scale[GATE_UP], scale[DOWN])
    return LayerLora(layer.layer, True, *ranks, *scales, dropout)


def _to_server(layer: _AdaptedLayer, parameter: str, a: torch.Tensor, b: torch.Tensor) -> AdapterTensors:
    experts = layer.module.kt_shapes[parameter][0]
    a_tensor, b_tensor = peft_layout.a_from_peft(a, experts), peft_layout.b_from_peft(b, experts)
    if parameter == DOWN:
        return {TensorKey(layer.layer, "a_down"): a_tensor, TensorKey(layer.layer, "b_down"): b_tensor}
    gate, up = peft_layout.split_gate_up(b_tensor, interleaved=not layer.module.is_concatenated)
    return {
        TensorKey(layer.layer, "a_gate"): a_tensor,
        TensorKey(layer.layer, "b_gate"): gate,
        TensorKey(layer.layer, "b_up"): up,
    }


def _to_peft(layer: _AdaptedLayer, parameter: str, part: str, tensors: AdapterTensors) -> torch.Tensor:
    def tensor(name: str) -> torch.Tensor:
        return tensors[TensorKey(layer.layer, name)]

    if part == "A":
        return peft_layout.a_to_peft(tensor("a_down" if parameter == DOWN else "a_gate"))
    if parameter == DOWN:
        return peft_layout.b_to_peft(tensor("b_down"))
    joined = peft_layout.join_gate_up(tensor("b_gate"), tensor("b_up"), interleaved=not layer.module.is_concatenated)
    return peft_layout.b_to_peft(joined)


def _shrink(layer: _AdaptedLayer, adapter: str) -> None:
    """The wrappers keep their tensors' shapes and give up the memory."""
    for wrapper in layer.wrappers:
        for side in (wrapper.lora_A, wrapper.lora_B):
            _replace_weight(side[adapter], torch.zeros(1).expand(side[adapter].weight.shape))


def _replace_weight(linear: nn.Module, value: torch.Tensor) -> None:
    """A new parameter, not new data: the old one may be on the meta device."""
    linear.weight = nn.Parameter(value, requires_grad=False)
