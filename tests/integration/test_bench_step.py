"""What `kt-expert bench step` measures, on a model that takes no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.bench.step import StepCase, measure_step, plot_step, print_step
from kt_expert_server.errors import InvalidRequest
from rich.console import Console

TINY = LayerShape("tiny", 4, 128, 64, 2)


@pytest.mark.parametrize("shared", [0, 2])
def test_a_step_and_a_block_with_shared_experts(tmp_path: Path, shared: int) -> None:
    found = measure_step(StepCase(TINY, 2, 32, shared, 1, 1, repeats=2))
    step = found["step"]
    assert 0.0 < step["experts_s"] < step["step_s"]
    assert step["wire_s"] > 0.0
    assert step["trainer_s"] + step["waiting_s"] == pytest.approx(step["step_s"], rel=0.5)  # medians of each
    assert step["over_longest"] >= 1.0
    assert ("block" in found) == bool(shared)
    json.dumps(found)
    console = Console(record=True, width=140)
    print_step(console, found)
    assert ("a block with shared experts" in console.export_text()) == bool(shared)
    plot_step(found, tmp_path / "plots" / "step.svg")
    assert (tmp_path / "plots" / "step.svg").stat().st_size > 0


def test_a_trainer_that_cannot_run_says_why() -> None:
    with pytest.raises(InvalidRequest, match="bench step needs"):
        measure_step(StepCase(TINY, 1, 8, 0, 1, 1, repeats=1, device="no-such-device"))
