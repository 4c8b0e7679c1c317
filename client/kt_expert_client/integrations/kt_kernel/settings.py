"""kt-kernel's configuration keys (kt_kernel/sft/config.py, 0.7.2; LLaMA-Factory 0.9.5): what each means here, or why not."""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kt_expert_client.errors import InvalidRequest, UnsupportedModel
from kt_expert_client.options import RunOptions

_log = logging.getLogger("kt_expert_client")
VARIABLE_PREFIX = "ACCELERATE_KT_"
_TICKETS = {"retain": "activations", "recompute": "inputs"}  # what the server keeps between forward and backward
_DEFAULT_EXPERTS = 2  # kt-kernel's extra experts, where their number is not given
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
_SERVER_LOADS = "the server loads the experts: start it with kt-expert-server serve --model DIR"
_SERVER_THREADS = "the server has the threads: start it with kt-expert-server serve --threads N"


@dataclass(frozen=True, slots=True)
class KtSettings:
    """What the keys come to."""

    options: RunOptions
    server: str | None = None
    train_mode: str = "lora"

    @classmethod
    def read(cls, given: Any, environment: Mapping[str, str], base: RunOptions | None = None) -> KtSettings:
        """`given` is a mapping of keys, or an object that has them or one such as its kt_config; the environment's
        ACCELERATE_KT_* count where it does not give a key. Raises InvalidRequest for a key that kt-kernel does not have or a
        value that makes no sense, UnsupportedModel for one that has no meaning here."""
        keys = _from_environment(environment) | _from_object(given)
        settings = cls(base or RunOptions())
        idle: list[str] = []
        for name in sorted(keys):
            if name not in _KEYS:
                nearest = difflib.get_close_matches(name, _KEYS, n=1, cutoff=0.0)[0]
                raise InvalidRequest(f"{name} is no key of kt-kernel's; did you mean {nearest}?")
            if keys[name] is None:
                continue
            changed = _KEYS[name](settings, name, keys[name])
            if changed is None:
                idle.append(name)
            else:
                settings = changed
        if idle:
            _log.info("%s: nothing to be done for it here", ", ".join(idle))
        return _with_extra_experts(settings, keys)


_Reader = Callable[[KtSettings, str, Any], KtSettings | None]


def _refused(reason: str, *accepted: object) -> _Reader:
    """Only these values are accepted, and mean nothing."""

    def read(settings: KtSettings, name: str, value: Any) -> None:
        del settings
        if not any(_same(value, each) for each in accepted):
            raise UnsupportedModel(f"{name}={value}: {reason}")

    return read


def _idle(settings: KtSettings, name: str, value: Any) -> None:
    """Memory or time that is not to be planned for here, whatever is asked for."""
    del settings, name, value


def _dropout(settings: KtSettings, name: str, value: Any) -> KtSettings:
    return replace(settings, options=replace(settings.options, dropout=_number(name, value)))


def _server(settings: KtSettings, name: str, value: Any) -> KtSettings:
    del name
    return replace(settings, server=str(value))


def _train_mode(settings: KtSettings, name: str, value: Any) -> KtSettings:
    if value == "hybrid":
        raise UnsupportedModel(
            f"{name}=hybrid: PEFT freezes the experts' weights when it adds LoRA; call "
            "kt_expert_client.train_in_full(model, layers) after get_peft_model"
        )
    if value not in ("lora", "full"):
        raise InvalidRequest(f"{name} is {value!r}, expected lora, full or hybrid")
    return replace(settings, train_mode="full") if value == "full" else settings


def _full_weight_grad(settings: KtSettings, name: str, value: Any) -> KtSettings:
    return replace(settings, train_mode="full") if _switch(name, value) else settings


def _activation_policy(settings: KtSettings, name: str, value: Any) -> KtSettings:
    """Of the CPU's side. The GPU's is the trainer's own gradient checkpointing."""
    policy = value if isinstance(value, str) else _attributes(value).get("cpu", "recompute")
    for part in policy.split(","):
        side, _, chosen = part.rpartition("=")
        if side.strip() not in ("", "cpu", "gpu") or chosen.strip() not in _TICKETS:
            raise InvalidRequest(f"{name} is {value!r}, expected retain or recompute, or cpu=...,gpu=... of them")
        if side.strip() != "gpu":
            settings = replace(settings, options=replace(settings.options, tickets=_TICKETS[chosen.strip()]))
    return settings


def _extra(settings: KtSettings, name: str, value: Any) -> KtSettings:
    """Looked at together once all are known."""
    if name == "kt_use_lora_experts":
        _switch(name, value)
    elif _number(name, value) != int(value) or int(value) < 1:
        raise InvalidRequest(f"{name} is {value!r}, expected a whole number above 0")
    return settings


_KEYS: dict[str, _Reader] = {
    "kt_expert_server": _server,  # ours
    "use_kt": _idle,
    "enabled": _idle,
    "kt_backend": _refused("the server chooses kernels by its CPU and by how the checkpoint is encoded", "auto", "amxbf16"),
    "kt_expert_weight_format": _refused("the server computes in the checkpoint's own encoding", "bf16"),
    "kt_num_threads": _refused(_SERVER_THREADS, 1),
    "kt_tp_enabled": _refused(_SERVER_THREADS, False),
    "kt_threadpool_count": _refused(_SERVER_THREADS, 1),
    "kt_weight_path": _refused(_SERVER_LOADS),
    "kt_non_expert_weight_path": _refused(_SERVER_LOADS),
    "kt_expert_checkpoint_path": _refused(_SERVER_LOADS),
    "kt_checkpoint_files": _refused(_SERVER_LOADS),
    "kt_sharded_metadata": _refused(_SERVER_LOADS),
    "kt_weight_lifecycle": _refused("the server keeps its weights while it runs", "persistent"),
    "kt_num_gpu_experts": _refused("all routed experts are on the server", 0),
    "kt_skip_expert_loading": _refused("experts' weights are never loaded here", True),
    "kt_wrap_fn": _refused("experts are replaced in one way only"),
    "kt_wrap_kwargs": _refused("experts are replaced in one way only"),
    "kt_share_backward_bb": _idle,  # the kernels need no second copy of the weights
    "kt_share_cache_pool": _idle,
    "kt_max_cache_depth": _idle,  # any number of forwards may wait for their backwards
    "kt_model_max_length": _idle,  # nothing is allocated for the longest batch
    "kt_force_fused_expert_lora": _idle,  # it always is
    "kt_lora_rank": _idle,  # PEFT's configuration decides
    "kt_lora_alpha": _idle,
    "kt_lora_dropout": _dropout,
    "kt_train_mode": _train_mode,
    "kt_full_weight_grad": _full_weight_grad,
    "kt_activation_policy": _activation_policy,
    "kt_cpu_activation": _activation_policy,
    "kt_use_lora_experts": _extra,
    "kt_lora_expert_num": _extra,
    "kt_lora_expert_intermediate_size": _extra,
}


def _with_extra_experts(settings: KtSettings, keys: Mapping[str, Any]) -> KtSettings:
    if not _switch("kt_use_lora_experts", keys.get("kt_use_lora_experts") or False):
        return settings
    number = int(keys.get("kt_lora_expert_num") or _DEFAULT_EXPERTS)
    size = int(keys.get("kt_lora_expert_intermediate_size") or RunOptions().lora_expert_size)
    return replace(settings, options=replace(settings.options, lora_experts=number, lora_expert_size=size))


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    return {
        "kt_" + name.removeprefix(VARIABLE_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(VARIABLE_PREFIX)
    }


def _from_object(given: Any) -> dict[str, Any]:
    """Of an object that is no mapping, only kt-kernel's names: it may be a program's whole configuration."""
    if given is None:
        return {}
    inner = given.get("kt_config") if isinstance(given, Mapping) else getattr(given, "kt_config", None)
    if inner is not None:
        return _from_object(inner)
    if isinstance(given, Mapping):
        return dict(given)
    return {name: value for name, value in _attributes(given).items() if name in _KEYS and value is not None}


def _attributes(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return dict(vars(value))


def _switch(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in _TRUE + _FALSE:
        raise InvalidRequest(f"{name} is {value!r}, expected true or false")
    return text in _TRUE


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidRequest(f"{name} is {value!r}, expected a number") from None


def _same(value: Any, accepted: object) -> bool:
    """The environment has text for everything."""
    text = str(value).strip().lower()
    if isinstance(accepted, bool):
        return text in (_TRUE if accepted else _FALSE)
    return text == str(accepted)
