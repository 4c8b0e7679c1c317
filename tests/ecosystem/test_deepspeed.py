"""DeepSpeed on two ranks. It lies in a folder of its own, DEEPSPEED_PATH, because accelerate and TRL change with it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.server import ServerProcess

from ecosystem.case import LOGIT_BOUND, LOSS_BOUND, NORM_BOUND, Figures, difference
from ecosystem.table import Row
from ecosystem.test_ranks import two_ranks

pytestmark = pytest.mark.timeout(600)


def run(checkpoint: Path, address: str, stage: int, location: str, folder: Path) -> dict[str, Any]:
    output = folder / f"{location}.json"
    result = two_ranks(
        "deepspeed_worker.py",
        *(str(checkpoint), address, str(stage), location, str(output)),
        PYTHONPATH=os.environ["DEEPSPEED_PATH"],
        DS_ACCELERATOR="cpu",
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def figures(found: dict[str, Any]) -> Figures:
    return Figures(found["losses"], found["norms"], torch.tensor(found["logits"]))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_lora_in_the_trainer(
    stage: int, server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, table: list[Row]
) -> None:
    expected = figures(run(qwen3_checkpoint, "-", stage, "stock", tmp_path))
    got = figures(run(qwen3_checkpoint, server.address, stage, "trainer", tmp_path))
    found = difference(got, expected)
    assert found.loss <= LOSS_BOUND
    assert found.norm <= NORM_BOUND
    assert found.logit <= LOGIT_BOUND
    kind = f"ZeRO-{stage} with clipping" if stage else "without ZeRO"
    table.append(Row(f"DeepSpeed: {kind}, LoRA in the trainer", "equal", found.loss, found.norm, found.logit, ""))


def test_lora_on_the_server_is_refused_on_several_ranks(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, table: list[Row]
) -> None:
    """It spreads gradients over the ranks, and no rank has the average of those on the server."""
    reason = run(qwen3_checkpoint, server.address, 1, "server", tmp_path)["refused"]
    assert "RunOptions(lora_location='trainer')" in reason
    table.append(Row("DeepSpeed: ZeRO-1 on several ranks, LoRA on the server", "refused", None, None, None, reason))


@pytest.mark.parametrize("location", ["trainer", "server"])
def test_zero_3_is_refused(
    location: str, server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, table: list[Row]
) -> None:
    reason = run(qwen3_checkpoint, server.address, 3, location, tmp_path)["refused"]
    assert "Use ZeRO-1 or ZeRO-2" in reason
    table.append(Row("DeepSpeed: ZeRO-3", "refused", None, None, None, reason))
