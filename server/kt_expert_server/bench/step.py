"""A whole training step with a real server: what the trainer, the experts and the wire take, and what is left of it where they
overlap."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kt_expert_server.bench.plots import figure_for
from kt_expert_server.bench.processes import serve
from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.errors import InvalidRequest

_CLIENT = "kt_expert_client.bench.step"
_MS_PER_S = 1000.0
_BARS = ("trainer_s", "experts_s", "wire_s", "step_s")
_BAR_WIDTH = 50  # characters


@dataclass(frozen=True, slots=True)
class StepCase:
    """A model of so many layers of a shape, with so many shared experts beside the others, and a batch of so many tokens. The
    engine and torch have so many threads each."""

    shape: LayerShape
    layers: int
    tokens: int
    shared_experts: int
    engine_threads: int
    torch_threads: int
    repeats: int
    device: str = "cpu"

    @property
    def sizes(self) -> dict[str, Any]:
        shape = self.shape
        return {
            "layers": self.layers, "experts": shape.experts, "hidden": shape.hidden, "intermediate": shape.intermediate,
            "top_k": shape.top_k, "tokens": self.tokens, "shared_experts": self.shared_experts,
            "threads": self.torch_threads, "repeats": self.repeats, "device": self.device,
        }  # fmt: skip


def measure_step(case: StepCase) -> dict[str, Any]:
    """Raises InvalidRequest where the trainer cannot be run, with what it says."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        sizes = json.dumps(case.sizes)
        _run("make", str(model), sizes)
        with serve(model, case.engine_threads) as (_, address):
            found: dict[str, Any] = json.loads(_run("measure", str(model), sizes, address).splitlines()[-1])
    step = found["step"]
    step["over_longest"] = step["step_s"] / max(step["trainer_s"], step["experts_s"], step["wire_s"])
    if "block" in found:
        found["block"] |= _overlap(found["block"])
    return found | {"case": asdict(case)}


def _run(*arguments: str) -> str:
    result = subprocess.run([sys.executable, "-m", _CLIENT, *arguments], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise InvalidRequest(f"bench step needs kt-expert[transformers]: {result.stderr.strip().splitlines()[-1:]}")
    return result.stdout


def _overlap(block: Mapping[str, float]) -> dict[str, float]:
    """Of both together over the longer of the two alone."""
    return {
        f"{way}_over_longer": block[f"both_{way}_s"] / max(block[f"remote_{way}_s"], block[f"shared_{way}_s"])
        for way in ("forward", "backward")
    }


def print_step(console: Console, found: Mapping[str, Any]) -> None:
    step = found["step"]
    longest = max(step[name] for name in _BARS)
    table = Table(title="one training step", title_justify="left")
    for name in ("", "ms", ""):
        table.add_column(name, justify="right" if name == "ms" else "left")
    for name in _BARS:
        bar = "#" * max(1, round(_BAR_WIDTH * step[name] / longest))
        table.add_row(name.removesuffix("_s"), f"{step[name] * _MS_PER_S:.0f}", bar)
    console.print(table)
    console.print(
        f"the step takes {step['over_longest']:.2f} of its longest part; the trainer waited "
        f"{step['waiting_s'] * _MS_PER_S:.0f} ms of it"
    )
    if "block" in found:
        block = found["block"]
        for way in ("forward", "backward"):
            alone = ", ".join(f"{kind} {block[f'{kind}_{way}_s'] * _MS_PER_S:.1f} ms" for kind in ("remote", "shared", "both"))
            console.print(f"a block with shared experts, {way}: {alone}: {block[f'{way}_over_longer']:.2f} of the longer one")


def plot_step(found: Mapping[str, Any], path: Path) -> None:
    """The same bars as a picture. Needs matplotlib."""
    step = found["step"]
    names = [name.removesuffix("_s") for name in _BARS]
    with figure_for(path, (8.0, 3.0)) as axis:
        axis.barh(names, [step[name] * _MS_PER_S for name in _BARS], color=["tab:blue", "tab:orange", "tab:green", "tab:gray"])
        axis.barh("step", step["waiting_s"] * _MS_PER_S, color="tab:red", label="of it waiting")
        axis.invert_yaxis()
        axis.set_xlabel("ms")
