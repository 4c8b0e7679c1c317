"""Callbacks for any transformers Trainer: which experts the router chooses, and where time goes. They work with experts on a
server and with stock ones in process alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kt_expert_client.errors import InvalidRequest, UnsupportedModel
from kt_expert_client.integrations.experts import RemoteExperts, is_experts_class, layer_index

_IDS = 1  # place of the expert ids among the arguments of an experts module


class ExpertActivationCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no annotations
    """Counts how many tokens the router sends to each expert of each layer while the model trains.

    Every `every` steps, and at the end, `output_dir` gets experts-STEP.json: {"step", "tokens": {layer: [count of expert 0, 1,
    ...]}, "imbalance": {layer: largest count over the mean}}, of the steps since the last file; at the end also experts.png, a
    heat map of all steps, where matplotlib is installed. Counts stay on the model's device until they are written. A forward
    that checkpointing repeats is counted once. Of several ranks, rank 0 writes what it has seen itself.
    """

    def __init__(self, output_dir: str | Path, every: int = 100) -> None:
        if every < 1:
            raise InvalidRequest(f"every is {every}, expected a number of steps of at least 1")
        self._folder, self._every = Path(output_dir), every
        self._counts: dict[int, torch.Tensor] = {}  # since the last file
        self._total: dict[int, torch.Tensor] = {}
        self._remove: list[Callable[[], None]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        """Raises UnsupportedModel for a model without experts modules."""
        del args, state, control
        model: nn.Module = kwargs["model"]
        for name, module in model.named_modules():
            if isinstance(module, RemoteExperts) or is_experts_class(type(module)):
                hook = module.register_forward_pre_hook(self._counter(layer_index(name), module), with_kwargs=True)
                self._remove.append(hook.remove)
        if not self._remove:
            raise UnsupportedModel(f"{type(model).__name__} has no experts modules whose choices could be counted")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        del args, control, kwargs
        if state.global_step % self._every == 0 and state.is_world_process_zero:
            self._write(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        del args, control, kwargs
        for remove in self._remove:
            remove()
        self._remove.clear()
        if state.is_world_process_zero:
            if self._counts:
                self._write(state.global_step)
            _draw(self._folder / "experts.png", {layer: counts.tolist() for layer, counts in sorted(self._total.items())})

    def _counter(self, layer: int, module: Any) -> Callable[..., None]:
        experts = int(module.num_experts)

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            in_backward = torch._C._current_graph_task_id() != -1  # checkpointing runs the forward again
            if not module.training or in_backward:
                return
            ids = args[_IDS] if len(args) > _IDS else kwargs.get("top_k_index", kwargs.get("router_indices"))
            if isinstance(ids, torch.Tensor):
                chosen = ids.detach().flatten()
                found = torch.bincount(chosen[chosen < experts], minlength=experts)
                self._counts[layer] = found + self._counts[layer] if layer in self._counts else found

        return count

    def _write(self, step: int) -> None:
        tokens = {layer: counts.tolist() for layer, counts in sorted(self._counts.items())}
        for layer, counts in self._counts.items():
            self._total[layer] = counts + self._total[layer] if layer in self._total else counts
        self._counts.clear()
        imbalance = {layer: max(counts) * len(counts) / max(1, sum(counts)) for layer, counts in tokens.items()}
        self._folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"step": step, "tokens": tokens, "imbalance": imbalance}, indent=1)
        (self._folder / f"experts-{step}.json").write_text(content + "\n", encoding="utf-8")


class TorchProfilerCallback(TrainerCallback):  # type: ignore[misc]  # transformers has no annotations
    """Profiles `active` training steps after `wait` and `warmup` others, `repeat` times, with torch.profiler.

    Each time leaves trace-STEP.json in `output_dir`, for chrome://tracing or Perfetto; calls to the server are the spans named
    ExpertsFunction. Of several ranks, rank 0 is profiled.
    """

    def __init__(self, output_dir: str | Path, wait: int = 5, warmup: int = 1, active: int = 3, repeat: int = 1) -> None:
        if wait < 0 or min(warmup, active, repeat) < 1:
            raise InvalidRequest(
                f"wait {wait}, warmup {warmup}, active {active}, repeat {repeat}: expected steps of at least 0, 1, 1 and 1"
            )
        self._folder = Path(output_dir)
        self._schedule = torch.profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=repeat)
        self._profiler: torch.profiler.profile | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        del args, control, kwargs
        if state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler = torch.profiler.profile(schedule=self._schedule, on_trace_ready=self._save, record_shapes=True)
            self._profiler.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        del args, state, control, kwargs
        if self._profiler is not None:
            self._profiler.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:  # fmt: skip
        del args, state, control, kwargs
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _save(self, profiler: torch.profiler.profile) -> None:
        profiler.export_chrome_trace(str(self._folder / f"trace-{profiler.step_num}.json"))


def _draw(path: Path, tokens: dict[int, list[int]]) -> None:
    """A row for each layer, a column for each expert; each row as a part of its mean. Nothing without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return
    if not tokens:
        return
    rows = torch.tensor(list(tokens.values()), dtype=torch.float32)
    figure = Figure(figsize=(8, 1 + 0.25 * len(tokens)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow((rows / rows.mean(dim=1, keepdim=True).clamp(min=1.0)).numpy(), aspect="auto", cmap="viridis")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_yticks(range(len(tokens)), [str(layer) for layer in tokens])
    axes.set_title("tokens of each expert, over the layer's mean")
    figure.colorbar(image)
    figure.savefig(path)
