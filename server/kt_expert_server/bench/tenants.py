"""What several runs on one server get together beside one run: tokens a second, interleaved, with a process a run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kt_expert_server.bench.plots import figure_for
from kt_expert_server.bench.processes import Process, serve
from kt_expert_server.bench.remote import write_model
from kt_expert_server.bench.shapes import LayerShape

SHAPE = LayerShape("qwen3-30b-a3b", 128, 2048, 768, 8)
_RANK = 16  # of LoRA on every projection
_ROUND_S = 2.0  # long enough for some tens of steps
_LEAD_S = 0.2  # for all processes to have heard when a round begins
_MOST_RUNS = 8
_SHARED_RUNS = 4
_SHARED_TOKENS = (8, 16, 32)
_TOKENS = 16


@dataclass(slots=True)
class Tenants:
    """So many runs of so many tokens a batch: tokens a second of all, of each round."""

    runs: int
    tokens: int
    per_second: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.per_second)


def tenant_cases() -> list[Tenants]:
    counts = [Tenants(runs, _TOKENS) for runs in (1, 2, 4, _MOST_RUNS)]
    fours = [Tenants(_SHARED_RUNS, tokens) for tokens in _SHARED_TOKENS if tokens != _TOKENS]
    return [*counts, *fours, *(Tenants(1, _SHARED_RUNS * tokens) for tokens in _SHARED_TOKENS)]


def measure_tenants(threads: int, repeats: int, shape: LayerShape = SHAPE, round_s: float = _ROUND_S) -> list[Tenants]:
    """Raises InvalidRequest where the client's package is not there."""
    found = tenant_cases()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_ones:
        model = Path(folder) / "model"
        write_model(model, shape)
        _, address = open_ones.enter_context(serve(model, threads))
        trainers = [open_ones.enter_context(Process("-m", "kt_expert_client.bench.remote")) for _ in range(_MOST_RUNS)]
        for seed, trainer in enumerate(trainers):
            trainer.ask(open=address, rank=_RANK, seed=1000 * seed)
        for number in range(repeats + 1):  # the first warms up
            for each in found:
                per_second = _round(trainers[: each.runs], each.tokens, round_s)
                if number:
                    each.per_second.append(per_second)
        for trainer in trainers:
            trainer.ask(close=True)
    return found


def _round(trainers: Sequence[Process], tokens: int, seconds: float) -> float:
    begin = time.time() + _LEAD_S
    for trainer in trainers:
        trainer.tell(train={"tokens": tokens, "begin": begin, "seconds": seconds})
    answers = [trainer.answer() for trainer in trainers]
    return sum(float(each["tokens"]) / float(each["seconds"]) for each in answers)


def _ratio(found: Sequence[Tenants], tokens: int) -> float:
    """Of several runs over one run that has all their tokens in a batch, in the same rounds."""
    several = next(each for each in found if (each.runs, each.tokens) == (_SHARED_RUNS, tokens))
    one = next(each for each in found if (each.runs, each.tokens) == (1, _SHARED_RUNS * tokens))
    return statistics.median(theirs / ours for theirs, ours in zip(several.per_second, one.per_second, strict=True))


def tenants_as_json(found: Sequence[Tenants]) -> dict[str, Any]:
    """Tokens a second at 16 tokens a batch, and what four runs get of what one batch of all their tokens does."""
    report: dict[str, Any] = {f"runs_{each.runs}": each.median for each in found if each.tokens == _TOKENS}
    report["one_run_4t"] = next(each.median for each in found if (each.runs, each.tokens) == (1, _SHARED_RUNS * _TOKENS))
    return report | {f"of_one_batch_{tokens}": _ratio(found, tokens) for tokens in _SHARED_TOKENS}


def print_tenants(console: Console, found: Sequence[Tenants]) -> None:
    table = Table(title=f"{SHAPE.name}: forward and backward of one layer, LoRA of rank {_RANK}", title_justify="left")
    for name in ("runs", "tokens each", "tokens/s of all"):
        table.add_column(name, justify="right")
    for each in sorted(found, key=lambda case: (case.runs * case.tokens, case.runs)):
        table.add_row(str(each.runs), str(each.tokens), f"{each.median:.0f}")
    console.print(table)
    for tokens in _SHARED_TOKENS:
        console.print(
            f"{_SHARED_RUNS} runs of {tokens} tokens get {_ratio(found, tokens):.2f} of one run with "
            f"{_SHARED_RUNS * tokens} tokens a batch"
        )


def plot_tenants(found: Sequence[Tenants], path: Path) -> None:
    """Tokens a second over the tokens of all runs together, for one run and for several. Needs matplotlib."""
    with figure_for(path) as axis:
        for label, chosen in (
            ("one run", [each for each in found if each.runs == 1]),
            (f"several runs of {_TOKENS}", [each for each in found if each.runs > 1 and each.tokens == _TOKENS]),
            (f"{_SHARED_RUNS} runs", [each for each in found if each.runs == _SHARED_RUNS]),
        ):
            ordered = sorted(chosen, key=lambda case: case.runs * case.tokens)
            tokens = [each.runs * each.tokens for each in ordered]
            axis.plot(tokens, [each.median for each in ordered], marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("tokens of all runs' batches")
        axis.set_ylabel("tokens/s of all runs")
