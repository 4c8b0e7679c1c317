"""Callbacks in a stock Trainer, with experts on a server and in process."""

from __future__ import annotations

import json
from pathlib import Path

import kt_expert_client as kt
import pytest
from kt_expert_client.integrations.callbacks import ExpertActivationCallback, TorchProfilerCallback
from support.server import ServerProcess
from support.training import adapted, trainer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
STEPS, ROWS, LENGTH, TOP_K = 4, 4, 16, 2  # rows of a step: 2 micro-batches of 2


def test_the_experts_that_were_chosen_are_counted(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path
) -> None:  # fmt: skip
    counted = []
    for name, address in (("stock", None), ("remote", server.address)):
        made = trainer(
            adapted(qwen3_checkpoint, address), tmp_path / name / "out", max_steps=STEPS, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )  # fmt: skip
        made.add_callback(ExpertActivationCallback(tmp_path / name, every=3))
        made.train()
        files = sorted((tmp_path / name).glob("experts-*.json"))
        assert [path.name for path in files] == ["experts-3.json", "experts-4.json"]
        counted.append([json.loads(path.read_text()) for path in files])
        assert (tmp_path / name / "experts.png").stat().st_size > 1000
    assert counted[0] == counted[1]
    first, rest = counted[1]
    assert [sum(counts) for counts in first["tokens"].values()] == [3 * ROWS * LENGTH * TOP_K] * 3
    assert [sum(counts) for counts in rest["tokens"].values()] == [ROWS * LENGTH * TOP_K] * 3
    assert all(1.0 <= value <= 8.0 for value in first["imbalance"].values())


def test_steps_are_profiled(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    made = trainer(adapted(qwen3_checkpoint, server.address), tmp_path / "out", max_steps=STEPS)
    made.add_callback(TorchProfilerCallback(tmp_path / "traces", wait=1, warmup=1, active=1))
    made.train()
    (trace,) = (tmp_path / "traces").glob("trace-*.json")
    assert "AwaitExperts" in trace.read_text()


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(kt.InvalidRequest, match="every is 0"):
        ExpertActivationCallback(tmp_path, every=0)
    with pytest.raises(kt.InvalidRequest, match="active 0"):
        TorchProfilerCallback(tmp_path, active=0)
