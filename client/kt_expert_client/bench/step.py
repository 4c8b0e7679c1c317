"""The trainer's side of `kt-expert bench step`: a whole training step of a model built from sizes, and one block alone.

    python -m kt_expert_client.bench.step make FOLDER SIZES       writes the model
    python -m kt_expert_client.bench.step measure FOLDER SIZES ADDRESS

SIZES is a JSON object (Sizes). What is measured goes to standard output as one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, PreTrainedConfig, Qwen3MoeConfig

from kt_expert_client.integrations.transformers import OFFLOADER, offload_experts
from kt_expert_client.profile.times import CallTimes

_VOCABULARY = 4096  # small: the head of a real one would hide what this is about
_HEAD_DIM = 128
_SEQUENCE = 512  # tokens
_LORA_RANK = 16
_RATE = 1e-4
_SEED = 0
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a model; `shared_experts` are as wide as the others. `threads` are torch's."""

    layers: int
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    tokens: int
    shared_experts: int
    threads: int
    repeats: int
    device: str

    @property
    def config(self) -> PreTrainedConfig:
        heads = max(1, self.hidden // _HEAD_DIM)
        common: dict[str, Any] = {
            "vocab_size": _VOCABULARY,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "moe_intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": max(self.tokens, _SEQUENCE),
        }
        if not self.shared_experts:
            return Qwen3MoeConfig(**common, num_experts=self.experts, head_dim=_HEAD_DIM)
        routed: dict[str, Any] = {"n_routed_experts": self.experts, "n_shared_experts": self.shared_experts}
        return Glm4MoeConfig(**common, **routed, first_k_dense_replace=0, head_dim=_HEAD_DIM)


def make(folder: Path, sizes: Sizes) -> None:
    torch.manual_seed(_SEED)
    AutoModelForCausalLM.from_config(sizes.config, dtype=torch.bfloat16).save_pretrained(folder)


class _Calls:
    """A listener: seconds of the calls since the last look."""

    def __init__(self) -> None:
        self._heard: list[CallTimes] = []

    def __call__(self, times: CallTimes) -> None:
        self._heard.append(times)

    def take(self) -> dict[str, float]:
        heard, self._heard = self._heard, []
        parts = [each.parts for each in heard]
        return {
            "experts_s": sum(each.server.compute_s for each in heard),
            "wire_s": sum(each.copy + each.send + each.back + each.hand_over for each in parts),
            "queue_s": sum(each.queue for each in parts),
            "waiting_s": sum(each.waited for each in parts),
        }


def measure(folder: Path, sizes: Sizes, address: str) -> dict[str, Any]:
    torch.manual_seed(_SEED)
    torch.set_num_threads(sizes.threads)
    with offload_experts(address):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    base.requires_grad_(False)  # else weights would be trained
    found: dict[str, Any] = {}
    if sizes.shared_experts:
        found["block"] = _measure_block(base.model.layers[0].mlp.to(sizes.device), sizes)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on names
        model = get_peft_model(base, LoraConfig(r=_LORA_RANK, target_modules=_ATTENTION, target_parameters=experts))
    model.to(sizes.device).train()
    calls = _Calls()
    OFFLOADER.client(address).recorder.listen(calls)
    found["step"] = _measure_steps(model, sizes, calls)
    return found


def _measure_steps(model: nn.Module, sizes: Sizes, calls: _Calls) -> dict[str, float]:
    """Medians over the steps but the first."""
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE)
    rows = max(1, sizes.tokens // _SEQUENCE)
    ids = torch.randint(0, _VOCABULARY, (rows, sizes.tokens // rows), device=sizes.device)
    steps: list[dict[str, float]] = []
    for _ in range(sizes.repeats + 1):
        calls.take()
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # until a GPU is done, too
        whole = time.perf_counter() - begun
        step = {"step_s": whole, **calls.take()}
        steps.append(step | {"trainer_s": whole - step["waiting_s"]})
    return {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}


def _measure_block(block: Any, sizes: Sizes) -> dict[str, float]:
    """Seconds of one block's forward and backward: of the experts on the server alone, of the shared ones alone, of both."""
    generator = torch.Generator().manual_seed(_SEED)
    hidden = torch.randn(1, sizes.tokens, sizes.hidden, generator=generator).to(sizes.device, torch.bfloat16)
    order = torch.rand(sizes.tokens, sizes.experts, generator=generator).argsort(dim=1)[:, : sizes.top_k].to(sizes.device)
    weights = torch.full((sizes.tokens, sizes.top_k), 1.0 / sizes.top_k, device=sizes.device, dtype=torch.bfloat16)

    kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "remote": lambda x: block.experts(x[0], order, weights) * 1.0,
        "shared": block.shared_experts,
        "both": block,
    }
    times: dict[str, list[float]] = {f"{kind}_{way}_s": [] for kind in kinds for way in ("forward", "backward")}
    for round_ in range(sizes.repeats + 1):  # the first warms up
        for kind, compute in kinds.items():
            x = hidden.clone().requires_grad_()
            begun = time.perf_counter()
            output = compute(x)
            _synchronise(output)
            middle = time.perf_counter()
            output.backward(torch.ones_like(output))
            _synchronise(x.grad)
            ended = time.perf_counter()
            if round_:
                times[f"{kind}_forward_s"].append(middle - begun)
                times[f"{kind}_backward_s"].append(ended - middle)
    return {name: statistics.median(each) for name, each in times.items()}


def _synchronise(tensor: torch.Tensor | None) -> None:
    if tensor is not None and tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def main(arguments: list[str]) -> None:
    what, folder, sizes = arguments[0], Path(arguments[1]), Sizes(**json.loads(arguments[2]))
    if what == "make":
        make(folder, sizes)
    else:
        found = measure(folder, sizes, arguments[3])
        OFFLOADER.close()
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
