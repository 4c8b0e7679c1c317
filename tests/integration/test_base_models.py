"""Runs and checkpoints belong to the weights they were trained on, and not to the files those lie in."""

from __future__ import annotations

import json
from pathlib import Path

import kt_expert_client as kt
import pytest
from kt_expert_client import AdamW
from support.batches import LORA, train_step
from support.models import build, save_checkpoint
from support.server import ServerProcess


def resharded(directory: Path) -> Path:
    """The same weights in many files, and a line of the config that is another."""
    build("qwen3_moe").bfloat16().save_pretrained(directory, max_shard_size="40KB")
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 4096}))
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def test_a_checkpoint_goes_with_its_weights(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    state = ("--state-dir", str(tmp_path / "state"))
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *state) as server, kt.connect(server.address) as client:
        run = client.open_run("mine", lora=LORA, wire_dtype="fp32")
        train_step(run, 0)
        run.step(AdamW(1e-2))
        run.save_checkpoint("kept")

    other = save_checkpoint("qwen3_moe", tmp_path / "other", seed=1)
    with ServerProcess(other, tmp_path / "log", *state) as server, kt.connect(server.address) as client:
        with pytest.raises(kt.InvalidRequest, match=r"belongs to another base model .* weights differ"):
            client.open_run("mine", lora=LORA, wire_dtype="fp32")
        run = client.open_run("fresh", lora=LORA, wire_dtype="fp32")
        with pytest.raises(kt.InvalidRequest, match="checkpoint 'kept' belongs to another base model"):
            run.load_checkpoint("kept")

    same = resharded(tmp_path / "same")
    with ServerProcess(same, tmp_path / "log", *state) as server, kt.connect(server.address) as client:
        assert client.open_run("mine", lora=LORA, wire_dtype="fp32").steps_taken == 1
        run = client.open_run("again", lora=LORA, wire_dtype="fp32")
        run.load_checkpoint("kept")
        assert run.steps_taken == 1
