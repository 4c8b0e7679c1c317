"""What a trainer of a large model pays on its own side: memory while PEFT makes the adapter, and Python's time in a step.

The model is made on the meta device, with LoRA on the experts alone; the server holds shapes only (shapes_only.py).
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, PreTrainedConfig

from kt_expert_client.bench.shapes_only import ShapesOnlyClient, as_client
from kt_expert_client.integrations.experts import RemoteExperts, local_spec
from kt_expert_client.integrations.transformers import OFFLOADER, patched_experts
from kt_expert_client.options import RunOptions
from kt_expert_client.parameters.tensor import RemoteTensor

_FP32_BYTES = 4
_KIB = 1024
_RESET_PEAK = "5"  # proc(5), clear_refs


@dataclass(frozen=True, slots=True)
class TrainerFigures:
    """Bytes and seconds. A step clips by norm, updates with AdamW and clears the gradients."""

    layers: int
    remote_tensors: int
    layer_lora_bytes: int
    injection_peak_bytes: int
    injection_s: float
    step_s: float
    step_requests: int

    @property
    def peak_in_layers(self) -> float:
        return self.injection_peak_bytes / self.layer_lora_bytes


def deepseek_v3(layers: int, rank_experts: int) -> PreTrainedConfig:
    """DeepSeek-V3's sizes; its other parts are on the meta device and cost nothing."""
    return DeepseekV3Config(num_hidden_layers=layers, n_routed_experts=rank_experts, experts_implementation="eager")


def measure_trainer(config: PreTrainedConfig, rank: int, repeats: int) -> TrainerFigures:
    """Raises OSError where the process may not reset its peak of memory (Linux)."""
    model, client = _model(config)
    lora = LoraConfig(
        r=rank, task_type="CAUSAL_LM", target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    begun = time.perf_counter()
    with _peak() as peak:
        adapted = get_peft_model(model, lora)
    injection_s = time.perf_counter() - begun
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    assert all(isinstance(p, RemoteTensor) for p in parameters)  # noqa: S101
    session = client.sessions[0]
    optimizer, times, requests = torch.optim.AdamW(parameters, lr=1e-4), [], 0
    for _ in range(repeats + 1):  # the first one warms up
        _backward(adapted, config)
        before, begun = session.requests, time.perf_counter()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begun)
        requests = session.requests - before
    layers = len(client.layers)
    layer_bytes = sum(p.numel() for p in parameters) * _FP32_BYTES // layers
    return TrainerFigures(
        layers, len(parameters), layer_bytes, peak[0], injection_s, statistics.median(times[1:]), requests
    )  # fmt: skip


def _model(config: PreTrainedConfig) -> tuple[Any, ShapesOnlyClient]:
    AutoModelForCausalLM._model_mapping[type(config)]  # imports the modeling module, so that its experts can be replaced
    with patched_experts(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    specs = [local_spec(name, each) for name, each in model.named_modules() if isinstance(each, RemoteExperts)]
    client = ShapesOnlyClient(config.model_type, specs, config.num_experts_per_tok)
    OFFLOADER.bind(model, as_client(client), RunOptions())
    return model, client


def _backward(model: nn.Module, config: PreTrainedConfig) -> None:
    """One token through each layer's experts, and back."""
    hidden = torch.zeros(1, config.hidden_size, requires_grad=True)
    ids, weights = torch.zeros(1, config.num_experts_per_tok, dtype=torch.int64), torch.ones(1, config.num_experts_per_tok)
    outputs = [each(hidden, ids, weights) for name, each in model.named_modules() if re.fullmatch(r".*\.mlp\.experts", name)]
    torch.stack(outputs).sum().backward()


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Afterwards: how far this process's memory was above what it is at the beginning, in bytes."""
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
    before, found = _status("VmRSS"), [0]
    yield found
    found[0] = _status("VmHWM") - before


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    match = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    assert match is not None  # noqa: S101  # proc(5) has both
    return int(match[1]) * _KIB
