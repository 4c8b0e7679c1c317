"""Two ranks: FSDP2 as stock has it, and what one rank does without the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.server import ServerProcess

from ecosystem.case import LOSS_BOUND, NORM_BOUND
from ecosystem.table import Row

SUPPORT = Path(__file__).resolve().parent.parent / "support"


def two_ranks(worker: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(SUPPORT / worker), *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize("location", ["server", "trainer"])
def test_fsdp2(location: str, server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, table: list[Row]) -> None:
    found = []
    for name, address in (("stock", "-"), ("remote", server.address)):
        (tmp_path / name).mkdir()
        arguments = [str(qwen3_checkpoint), address, str(tmp_path / name / "figures.json"), location]
        result = two_ranks("fsdp_worker.py", *arguments)
        assert result.returncode == 0, result.stderr
        found.append(json.loads((tmp_path / name / "figures.json").read_text()))
    stock, remote = found
    loss = max(abs(ours - theirs) for ours, theirs in zip(remote["losses"], stock["losses"], strict=True))
    norm = max(abs(ours / theirs - 1) for ours, theirs in zip(remote["norms"], stock["norms"], strict=True))
    assert loss <= LOSS_BOUND
    assert norm <= NORM_BOUND
    saved = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("stock", "remote")]
    assert saved[0].keys() == saved[1].keys()
    for key, value in saved[0].items():
        torch.testing.assert_close(saved[1][key], value, rtol=0, atol=1e-6)
    where = "" if location == "server" else ", LoRA in the trainer"
    table.append(Row(f"T11: fully_shard at the root, and the adapter saved{where}", "equal", loss, norm, None, ""))


def test_rank_0_may_do_things_alone(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, table: list[Row]
) -> None:  # fmt: skip
    result = two_ranks("ranks_worker.py", str(qwen3_checkpoint), server.address, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert all((tmp_path / f"losses{rank}.json").exists() for rank in range(2))
    table.append(Row("T27: rank 0 alone loads, evaluates and reloads", "equal", None, None, None, "nobody waits for a rank"))


def test_a_rank_that_is_alone_by_mistake_is_told_what_it_waits_for(
    server: ServerProcess, qwen3_checkpoint: Path, table: list[Row]
) -> None:
    script = f"""
import logging, sys, threading
sys.path.insert(0, {str(SUPPORT.parent)!r})
logging.basicConfig(format="%(message)s")
from support.training import adapted
from support.models import random_tokens
import torch
model = adapted({str(qwen3_checkpoint)!r}, {server.address!r})
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
tokens = random_tokens(1, 6)
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer.step()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"},
    )
    assert process.stderr is not None
    try:
        said = next((line for line in process.stderr if "waiting for" in line), "")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert "2 in all, to come to the same step" in said
    table.append(Row("T27: WORLD_SIZE=2 left in the environment", "refused", None, None, None, said.strip()))


pytestmark = pytest.mark.timeout(600)
