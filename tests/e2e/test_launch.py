"""Programs that have no place for an import, started through kt_expert_client.launch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import ServerProcess

# A trainer that starts its workers by torchrun, as LLaMA-Factory does, and imports transformers late.
PROGRAM = """
import importlib.util, subprocess, sys
assert importlib.util.find_spec("transformers") is not None  # as accelerate looks whether it is there
if len(sys.argv) > 2:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", __file__, sys.argv[1]]
    sys.exit(subprocess.run(command).returncode)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("experts:", type(model.model.layers[0].mlp.experts).__name__)
"""


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kt_expert_client.launch", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize("spawns", [[], ["spawn"]], ids=["one process", "its workers"])
def test_every_process_offloads(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, spawns: list[str]
) -> None:  # fmt: skip
    program = tmp_path / "train.py"
    program.write_text(PROGRAM)
    result = launch("--server", server.address, "--", sys.executable, str(program), str(qwen3_checkpoint), *spawns)
    assert "experts: RemoteQwen3MoeExperts" in result.stdout, result.stderr


def test_a_sitecustomize_of_the_machines_is_run_too(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("print('the machine says hello')")
    result = launch("--server", "there:1", "--", sys.executable, "-c", "print('and so do I')", PYTHONPATH=str(tmp_path))
    # Once in the launcher, and once in what it becomes.
    assert result.stdout.splitlines() == ["the machine says hello"] * 2 + ["and so do I"], result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no server: give --server HOST:PORT, or set KT_EXPERT_SERVER"),
        (("--server", "there:1"), "no command: give what to start after --"),
        (("--server", "there:1", "--", "no-such-trainer"), "there is no command 'no-such-trainer'"),
    ],
)
def test_what_is_missing_is_named(arguments: tuple[str, ...], sentence: str) -> None:
    result = launch(*arguments)
    assert result.returncode == 2
    assert sentence in result.stderr
