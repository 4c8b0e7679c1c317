"""Loading transformers models with their experts elsewhere."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from kt_expert_client.connection import Client, connect
from kt_expert_client.errors import InvalidRequest, UnsupportedModel
from kt_expert_client.integrations.experts import (
    RemoteExperts,
    convert_in_place,
    is_experts_class,
    loaded_experts_classes,
    local_spec,
    remote_class,
)
from kt_expert_client.integrations.lora_experts import add_lora_experts, watch_blocks
from kt_expert_client.offload import ModelOffload
from kt_expert_client.options import RunOptions
from kt_expert_client.parameters import gradient_operations, operations  # noqa: F401  # register what they define
from kt_expert_client.parameters.ddp import NamesForDdp
from kt_expert_client.parameters.driver import OptimizerDriver
from kt_expert_client.start import SERVER_VARIABLE

OFFLOAD_ATTRIBUTE = "kt_expert_offload"
_DDP_ATTRIBUTE = "_ddp_params_and_buffers_to_ignore"  # torch's name
_EXPERT_KEYS = r"\.experts\."
_CONFIG_SIGNS_OF_MOE = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Offloader:
    """Loads models against servers, one connection an address. Its hooks are in place while there is an address to use."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._targets: list[tuple[str, RunOptions]] = []
        self._clients: dict[str, Client] = {}
        self._originals: dict[str, Any] = {}
        self._models = 0  # connected so far, but for those of one rank alone
        self._building = threading.local()  # `depth`: how many models this thread is building, one inside the other
        self._optimizer_driver = OptimizerDriver()
        self._peft_registration: Any = None

    def client(self, address: str) -> Client:
        with self._lock:
            if address not in self._clients:
                self._clients[address] = connect(address)
            return self._clients[address]

    def push(self, address: str, options: RunOptions) -> None:
        """Models loaded from now on use `address`."""
        with self._lock:
            self._targets.append((address, options))
            if len(self._targets) == 1:
                self._install()

    def pop(self) -> None:
        with self._lock:
            self._targets.pop()
            if not self._targets:
                self._uninstall()

    def bind(self, model: nn.Module, client: Client, options: RunOptions) -> ModelOffload | None:
        """Connects a model's remote experts to the server. None where it has none."""
        from kt_expert_client.integrations.peft import Registration

        remote = [(name, module) for name, module in model.named_modules() if isinstance(module, RemoteExperts)]
        if not remote:
            return None
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        specs = [local_spec(name, module) for name, module in remote]
        wire_dtype = "bf16" if dtype == torch.bfloat16 else "fp32"
        self._models += not options.alone
        offload = ModelOffload(client, _model_types(model), specs, wire_dtype, options, self._models)
        for spec, (_, module) in zip(specs, remote, strict=True):
            module.kt_connect(offload.layers[spec.layer], offload, dtype)
        watch_blocks(model)
        if options.lora_experts:
            add_lora_experts(model, options.lora_experts, options.lora_expert_size)
        object.__setattr__(model, OFFLOAD_ATTRIBUTE, offload)
        object.__setattr__(model, _DDP_ATTRIBUTE, NamesForDdp(model, offload.use_ddp_parameter))
        self._optimizer_driver.install()
        self._optimizer_driver.watch(offload.parameters)
        if self._peft_registration is None:
            self._peft_registration = Registration()
        self._peft_registration.install()
        return offload

    def close(self) -> None:
        """Leaves all runs; the models cannot be used afterwards."""
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def _install(self) -> None:
        for name in ("from_pretrained", "_from_config"):
            original = PreTrainedModel.__dict__[name]
            self._originals[name] = original
            setattr(PreTrainedModel, name, classmethod(self._wrapped(original.__func__)))
        PreTrainedModel.load_adapter = self._load_adapter(PreTrainedModel.load_adapter)  # inherited until now

    def _uninstall(self) -> None:
        for name, original in self._originals.items():
            setattr(PreTrainedModel, name, original)
        self._originals.clear()
        del PreTrainedModel.load_adapter

    def _load_adapter(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """from_pretrained, given an adapter's folder, loads that before it returns the model."""

        def load_adapter(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
            self._bind_last(model)
            return original(model, *args, **kwargs)

        return load_adapter

    def _bind_last(self, model: PreTrainedModel) -> None:
        """Connects a model that was just built to the server that models are loaded against."""
        if getattr(model, OFFLOAD_ATTRIBUTE, None) is None:
            with self._lock:
                address, options = self._targets[-1]
            if self.bind(model, self.client(address), options) is None:
                _refuse_moe(model)

    def _wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def load(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
            depth = getattr(self._building, "depth", 0)
            self._building.depth = depth + 1
            try:
                with patched_experts(), expert_keys_expected(cls):
                    result = original(cls, *args, **kwargs)
            finally:
                self._building.depth = depth
            if depth == 0:  # else this is the language model of one that has more, which is bound as a whole
                self._bind_last(result[0] if isinstance(result, tuple) else result)
            return result

        return load


OFFLOADER = Offloader()


@contextlib.contextmanager
def patched_experts() -> Iterator[None]:
    """Inside, transformers' modeling modules build remote experts in place of their own. Done here and not through the
    library's registry of replacements, which imports every module of the library it can find (5.6)."""
    replaced = loaded_experts_classes()
    for module, name, stock in replaced:
        setattr(module, name, remote_class(stock))
    try:
        yield
    finally:
        for module, name, stock in replaced:
            setattr(module, name, stock)


@contextlib.contextmanager
def expert_keys_expected(cls: type[PreTrainedModel]) -> Iterator[None]:
    """Inside, loading does not report the checkpoint's expert tensors as a surprise: leaving them out is the purpose."""
    own = "_keys_to_ignore_on_load_unexpected" in vars(cls)
    before = cls._keys_to_ignore_on_load_unexpected
    cls._keys_to_ignore_on_load_unexpected = [*(before or []), _EXPERT_KEYS]
    try:
        yield
    finally:
        if own:
            cls._keys_to_ignore_on_load_unexpected = before
        else:
            del cls._keys_to_ignore_on_load_unexpected


@contextlib.contextmanager
def offload_experts(address: str, options: RunOptions | None = None) -> Iterator[None]:
    """Models loaded inside (``from_pretrained``, ``from_config``) get their experts from the server at `address`.

    The models stay connected after the block. Raises ServerUnavailable, or WrongPhase where the server has another model.
    """
    OFFLOADER.push(address, options or RunOptions.from_environment())
    try:
        yield
    finally:
        OFFLOADER.pop()


def enable(address: str) -> None:
    """offload_experts for the rest of the process: what KT_EXPERT_SERVER does."""
    OFFLOADER.push(address, RunOptions.from_environment())


def attach(model: nn.Module, address: str | None = None, options: RunOptions | None = None) -> ModelOffload:
    """Connects a model that was built in another way: its experts lose their weights and compute on the server.

    `address` defaults to KT_EXPERT_SERVER, options to their own variables. A model that is connected already keeps its
    connection and takes the options. LoRA of PEFT's that is on the experts moves to the server: make optimizers afterwards.
    Raises InvalidRequest without an address or for another one, WrongPhase for other
    options than those of an open run, UnsupportedModel for a model without experts classes the client knows.
    """
    existing = getattr(model, OFFLOAD_ATTRIBUTE, None)
    if isinstance(existing, ModelOffload):
        if address is not None and address != existing.client.address:
            raise InvalidRequest(f"this model's experts are at {existing.client.address} already; load it anew for {address}")
        if options is not None:
            existing.use_options(options)
        return existing
    server = address or os.environ.get(SERVER_VARIABLE)
    if not server:
        raise InvalidRequest(f"attach needs the server's address: give it, or set {SERVER_VARIABLE}=host:port")
    inner = _inside_peft(model)
    for module in list(inner.modules()):
        if is_experts_class(type(module)):
            convert_in_place(module)
    offload = OFFLOADER.bind(inner, OFFLOADER.client(server), options or RunOptions.from_environment())
    if offload is None:
        raise UnsupportedModel(f"{type(inner).__name__} has no experts module with transformers' standard signature")
    if inner is not model:
        from kt_expert_client.integrations.peft import give_adapters_to_server

        give_adapters_to_server(inner)
    return offload


def _inside_peft(model: nn.Module) -> nn.Module:
    """The transformers model that PEFT has wrapped, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else cast("nn.Module", get_base_model())


def _model_types(model: nn.Module) -> list[str]:
    """model_type of the model and of the language model inside it, where it has one."""
    config: Any = model.config
    return [config.model_type, config.get_text_config().model_type]


def _refuse_moe(model: PreTrainedModel) -> None:
    """A mixture of experts whose experts stayed here is not what was asked for. Raises UnsupportedModel."""
    config = model.config.get_text_config()
    if any(getattr(config, sign, None) for sign in _CONFIG_SIGNS_OF_MOE):
        quantised = getattr(model.config, "quantization_config", None) is not None
        advice = "; load it dequantised" if quantised else ""
        raise UnsupportedModel(
            f"{type(model).__name__} looks like a mixture of experts, but none of its modules can be offloaded{advice}"
        )
