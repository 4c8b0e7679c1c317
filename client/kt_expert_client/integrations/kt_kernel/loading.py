"""kt-kernel's ways to give a model its experts (kt_kernel/sft/wrapper.py, 0.7.2), over a kt-expert-server."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kt_expert_client.errors import InvalidRequest, UnsupportedModel
from kt_expert_client.full import train_in_full
from kt_expert_client.integrations.experts import RemoteExperts
from kt_expert_client.integrations.kt_kernel.settings import KtSettings
from kt_expert_client.options import RunOptions
from kt_expert_client.start import SERVER_VARIABLE, attach, offload_experts

_PASSED_ON = ("cache_dir", "revision")  # of a program's model arguments


def load_kt_model(
    config: PretrainedConfig,
    model_args: Any = None,
    finetuning_args: Any = None,
    kt_plugin: Any = None,
    model_name_or_path: str | None = None,
    trust_remote_code: bool | None = None,
    token: str | None = None,
    torch_dtype: torch.dtype | str | None = torch.bfloat16,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model with its experts on the server that kt_expert_server, or KT_EXPERT_SERVER, names; everything else
    on this rank's GPU, where there is one.

    Keys are kt_plugin's, or those of model_args (see KtSettings). `finetuning_type` full trains the experts' weights. Raises
    InvalidRequest without a server or a model's name.
    """
    path = model_name_or_path or getattr(model_args, "model_name_or_path", None)
    if path is None:
        raise InvalidRequest("load_kt_model needs model_name_or_path, or model_args that have it")
    settings = _settings(kt_plugin if kt_plugin is not None else model_args)
    given = {
        "trust_remote_code": _first(trust_remote_code, getattr(model_args, "trust_remote_code", None)),
        "token": _first(token, getattr(model_args, "hf_hub_token", None)),
        **{name: getattr(model_args, name, None) for name in _PASSED_ON},
    }
    with offload_experts(_address(settings), settings.options):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            **{"config": config, "dtype": torch_dtype}
            | {name: value for name, value in given.items() if value is not None}
            | {name: value for name, value in kwargs.items() if name != "low_cpu_mem_usage"},
        )
    if "device_map" not in kwargs and torch.cuda.is_available():
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    if settings.train_mode == "full" or getattr(finetuning_args, "finetuning_type", None) == "full":
        train_in_full(model)
    return model


def wrap_moe_layers_with_kt_wrapper(model: nn.Module, kt_plugin: Any) -> list[RemoteExperts]:
    """The experts of a model that was loaded otherwise lose their weights and are the server's. Returns them in order.
    Raises InvalidRequest without a server, UnsupportedModel for a model without experts the client knows."""
    settings = _settings(kt_plugin)
    attach(model, _address(settings), settings.options)
    if settings.train_mode == "full":
        train_in_full(model)
    return [module for module in model.modules() if isinstance(module, RemoteExperts)]


wrap_moe_layers = wrap_moe_layers_with_kt_wrapper


def build_kt_device_map(config: PretrainedConfig, kt_plugin: Any = None, device: str = "cuda:0") -> dict[str, str | int]:
    """Every part of the model on `device`, one entry for each: experts are in none, for they hold nothing here.

    Raises UnsupportedModel for a model whose layers are not found.
    """
    _settings(kt_plugin)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and name.endswith("layers")]
    if not found:
        raise UnsupportedModel(f"{type(model).__name__} has no list of layers")
    layers = min(found, key=len)
    inside = layers.split(".")[:-1]
    parts: dict[str, str | int] = {}
    for depth in range(len(inside) + 1):  # at each level down to the layers, what is beside the way
        path = ".".join(inside[:depth])
        for name, _ in model.get_submodule(path).named_children():
            if depth == len(inside) or name != inside[depth]:
                parts[f"{path}.{name}".lstrip(".")] = device
    del parts[layers]
    return parts | {f"{layers}.{index}": device for index in range(len(model.get_submodule(layers)))}


def _settings(given: Any) -> KtSettings:
    return KtSettings.read(given, os.environ, RunOptions.from_environment())


def _address(settings: KtSettings) -> str:
    address = settings.server or os.environ.get(SERVER_VARIABLE)
    if not address:
        raise InvalidRequest(f"no server is named: give the key kt_expert_server, or set {SERVER_VARIABLE}=host:port")
    return address


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
