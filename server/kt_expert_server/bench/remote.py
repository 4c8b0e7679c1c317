"""What a remote call costs beside the same call of the engine in this process: interleaved, with a real server process and a
trainer process of its own."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kt_expert_native as native
import numpy as np
from kt_expert_proto.fast_path import MOST_SPIN_US
from kt_expert_proto.malloc import keep_freed_memory
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from kt_expert_server.bench.layer import Batch, LayerBench, make_batch
from kt_expert_server.bench.plots import figure_for
from kt_expert_server.bench.processes import Process, serve
from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.config import ISA_VARIABLE
from kt_expert_server.engine.passes import TILE_TOKENS

TRANSPORTS = ("stream", "tcp", "same-host")
SPINNING = "same-host, spinning"  # for small forwards: both ends look for the other's word before they sleep
_KEYS = {"stream": "stream", "tcp": "data_plane", "same-host": "shm", SPINNING: "shm_spin"}
_SUFFIXES = {
    "32 MiB": "",
    "32 MiB, two in flight": "_two",
    "32 MiB, all cores": "_all_cores",
    "32 MiB, all cores, two in flight": "_all_cores_two",
}
_RANK = 16  # of LoRA on every projection
_MODEL_TYPE = "qwen3_moe"
_MS_PER_S = 1000.0
_BAR_HEIGHT = 0.2
_DECODES = 20  # calls of one token in a row: one alone is mostly the time to wake up


@dataclass(frozen=True, slots=True)
class Case:
    """A batch of one shape, on so many threads of the engine, so many calls in flight."""

    name: str
    shape: LayerShape
    tokens: int
    threads: int
    in_flight: int = 1
    calls: int = 1  # in one round
    looks_for_stalls: bool = False
    is_decode: bool = False  # forwards alone, of which nothing is kept

    @property
    def transports(self) -> tuple[str, ...]:
        return (*TRANSPORTS, SPINNING) if self.is_decode else TRANSPORTS


@dataclass(slots=True)
class Figures:
    """Seconds a call of each round, through one transport."""

    case: Case
    transport: str
    local: list[float] = field(default_factory=list)
    remote: list[float] = field(default_factory=list)
    local_forward: list[float] = field(default_factory=list)
    remote_forward: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)  # the longest of another thread of the trainer, where it is looked for

    @property
    def ratio(self) -> float:
        """Remote over in process: forward and backward, or for decoding forwards alone."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.local, self.remote, strict=True))

    @property
    def extra_forward_s(self) -> float:
        return statistics.median(theirs - ours for ours, theirs in zip(self.local_forward, self.remote_forward, strict=True))


def cases(cores: int) -> list[Case]:
    """32 MiB each way with small experts, on one thread and on all cores; a layer of Qwen3-30B-A3B at one token."""
    large = LayerShape("32 MiB", 8, 4096, 112, 2)
    decode = LayerShape("qwen3-30b-a3b", 128, 2048, 768, 8)
    return [
        Case("32 MiB", large, 4096, 1, looks_for_stalls=True),
        Case("32 MiB, two in flight", large, 4096, 1, in_flight=2),
        Case("32 MiB, all cores", large, 4096, cores),
        Case("32 MiB, all cores, two in flight", large, 4096, cores, in_flight=2),
        Case("one token", decode, 1, cores, calls=_DECODES, is_decode=True),
    ]


def measure_remote(wanted: list[Case], repeats: int) -> list[Figures]:
    """Raises InvalidRequest where the client's package is not there."""
    keep_freed_memory()  # as the server does: otherwise fresh pages would count for the engine
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in wanted:
            model = Path(folder) / case.shape.name.replace(" ", "-")
            if not model.exists():
                write_model(model, case.shape)
            found += _measure(case, model, repeats)
    return found


def _measure(case: Case, model: Path, repeats: int) -> list[Figures]:
    """Rounds of a call in process and one through each transport."""
    engine = native.Engine(case.threads, os.environ.get(ISA_VARIABLE, ""))
    local, batch = LayerBench(engine, case.shape, "bf16"), make_batch(case.shape, case.tokens)
    found = [Figures(case, transport) for transport in case.transports]
    with ExitStack() as open_ones:
        trainers = {each: open_ones.enter_context(trainer_for(each, model, case.threads))[0] for each in case.transports}
        for number in range(repeats + 1):  # the first warms up
            forward, backward = _in_process(local, batch, case)
            for figures in found:
                trainer = trainers[figures.transport]
                remote = _call(trainer, case)
                if number:
                    figures.local.append(forward + backward)
                    figures.local_forward.append(forward)
                    figures.remote.append(remote["forward_s"] + remote["backward_s"])
                    figures.remote_forward.append(remote["forward_s"])
                if number and case.looks_for_stalls:
                    figures.stalls.append(trainer.ask(stall={"tokens": case.tokens, "calls": 1})["during_s"])
        for trainer in trainers.values():
            trainer.ask(close=True)
    return found


@contextmanager
def trainer_for(transport: str, model: Path, threads: int, rank: int = _RANK) -> Iterator[tuple[Process, Process]]:
    """A trainer with a server of its own: servers of one benchmark are idle while others are measured."""
    spin = ("--spin", str(MOST_SPIN_US)) if transport == SPINNING else ()
    environment = {"KT_EXPERT_SPIN": str(MOST_SPIN_US)} if transport == SPINNING else {}
    with ExitStack() as both:
        server, address = both.enter_context(serve(model, threads, *spin))
        trainer = both.enter_context(Process("-m", "kt_expert_client.bench.remote", environment=environment))
        trainer.ask(open=address, rank=rank, transport="same-host" if transport == SPINNING else transport)
        yield trainer, server


def _in_process(local: LayerBench, batch: Batch, case: Case) -> tuple[float, float]:
    """Seconds of a forward and of a backward, in the parts in which a server computes it, which is quicker."""
    times = [local.run(batch, _RANK, backward=not case.is_decode, tile_tokens=TILE_TOKENS) for _ in range(case.calls)]
    forward, backward = (statistics.median(float(each[side] or 0.0) for each in times) for side in (0, 1))
    return forward, backward


def _call(trainer: Process, case: Case) -> dict[str, float]:
    if case.is_decode:
        return {"backward_s": 0.0, **trainer.ask(decode={"tokens": case.tokens, "repeats": case.calls})}
    return trainer.ask(call={"tokens": case.tokens, "in_flight": case.in_flight, "repeats": case.calls})


def write_model(folder: Path, shape: LayerShape) -> None:
    """A checkpoint of one layer of experts, in fp16: numpy has no bf16."""
    generator = np.random.default_rng(0)
    pattern = (generator.standard_normal(shape.hidden * shape.intermediate, np.float32) * shape.hidden**-0.5).astype(np.float16)
    sizes = {
        "gate": (shape.intermediate, shape.hidden),
        "up": (shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }
    tensors = {
        f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight": np.roll(pattern, 64 * (3 * expert + number)).reshape(size)
        for expert in range(shape.experts)
        for number, (name, size) in enumerate(sizes.items())
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": _MODEL_TYPE,
        "hidden_size": shape.hidden,
        "num_hidden_layers": 1,
        "num_experts_per_tok": shape.top_k,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def remote_as_json(found: list[Figures]) -> dict[str, Any]:
    """The figures under the names that dashboards of this benchmark have."""
    report: dict[str, Any] = {}
    for each in found:
        prefix = _KEYS[each.transport]
        if each.case.name in _SUFFIXES:
            report[f"{prefix}_ratio{_SUFFIXES[each.case.name]}"] = each.ratio
            if each.stalls:
                report[f"{prefix}_stall_ms"] = statistics.median(each.stalls) * _MS_PER_S
        else:
            report[f"decode_extra_ms_{prefix}"] = each.extra_forward_s * _MS_PER_S
    report["in_process_ms"] = {each.case.name: statistics.median(each.local) * _MS_PER_S for each in found}
    return report


def print_remote(console: Console, found: list[Figures]) -> None:
    table = Table(
        title="forward and backward of one layer, LoRA of rank 16; of one token a forward alone",
        title_justify="left",
    )
    for name in ("case", "through", "in process, ms", "remote, ms", "ratio", "forward adds, ms", "longest stall, ms"):
        table.add_column(name, justify="left" if name in ("case", "through") else "right")
    for each in found:
        local, remote = (statistics.median(times) * _MS_PER_S for times in (each.local, each.remote))
        milliseconds = f"{local:.2f}", f"{remote:.2f}"
        stall = f"{statistics.median(each.stalls) * _MS_PER_S:.1f}" if each.stalls else ""
        added = f"{each.extra_forward_s * _MS_PER_S:.2f}"
        table.add_row(each.case.name, each.transport, *milliseconds, f"{each.ratio:.3f}", added, stall)
    console.print(table)


def plot_remote(found: list[Figures], path: Path) -> None:
    """Remote over in process, a bar for each case and transport. Needs matplotlib."""
    with figure_for(path, (8.0, 4.5)) as axis:
        names = list(dict.fromkeys(each.case.name for each in found))
        for index, transport in enumerate((*TRANSPORTS, SPINNING)):
            rows = [each for each in found if each.transport == transport]
            heights = [names.index(each.case.name) + index * _BAR_HEIGHT for each in rows]
            axis.barh(heights, [each.ratio for each in rows], height=_BAR_HEIGHT, label=transport)
        axis.set_yticks(range(len(names)), names)
        axis.axvline(1.0, color="black", linestyle="--", label="in process")
        axis.invert_yaxis()
        axis.set_xlabel("forward and backward, remote over in process")
