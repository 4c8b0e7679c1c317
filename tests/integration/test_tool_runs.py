"""kt-expert runs and kt-expert checkpoint, as an operator starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import kt_expert_client as kt
import pytest
from support.batches import LORA, train_step
from support.server import ServerProcess


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kt_expert_server.cli.tool", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_runs_are_listed_and_closed(server: ServerProcess) -> None:
    with kt.connect(server.address) as client:
        run = client.open_run("to-close", lora=LORA, wire_dtype="fp32")
        listed = tool("runs", "--server", server.address, "ls")
        assert "to-close: step 0, 1 of 1 ranks connected" in listed.stdout
        closed = tool("runs", "--server", server.address, "close", "to-close")
        assert (closed.returncode, closed.stdout) == (0, "closed to-close\n")
        with pytest.raises(kt.NotFound, match="run 'to-close' was closed"):
            train_step(run, 0)
    again = tool("runs", "--server", server.address, "close", "to-close")
    assert again.returncode == 3
    assert "run 'to-close' is not open" in again.stderr


def test_checkpoints_are_listed_verified_and_removed(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    arguments = ("--state-dir", str(state))
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *arguments) as process, kt.connect(process.address) as client:
        run = client.open_run("run", lora=LORA, wire_dtype="fp32")
        for name in ("one", "two"):
            run.save_checkpoint(name)
    listed = tool("checkpoint", "--state-dir", str(state), "ls")
    assert "one: run run, step 0" in listed.stdout
    assert tool("checkpoint", "--state-dir", str(state), "verify").returncode == 0
    damaged = state / "checkpoints" / "two" / "adapter-000-layer-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    verified = tool("checkpoint", "--state-dir", str(state), "verify")
    assert verified.returncode == 1
    assert "one: whole" in verified.stdout
    assert "two: checkpoint 'two': adapter-000-layer-00000.safetensors is damaged" in verified.stdout
    assert tool("checkpoint", "--state-dir", str(state), "rm", "two").stdout == "removed two\n"
    assert "two" not in tool("checkpoint", "--state-dir", str(state), "ls").stdout
    assert tool("checkpoint", "--state-dir", str(state), "rm", "../one").returncode == 2
    assert "is not a directory" in tool("checkpoint", "--state-dir", str(tmp_path / "none"), "ls").stderr
