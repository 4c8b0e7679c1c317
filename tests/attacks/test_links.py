"""A link among the checkpoints that leads outside is not followed."""

from __future__ import annotations

from pathlib import Path

import kt_expert_client as kt
import pytest
from support.batches import LORA
from support.server import ServerProcess


def test_a_link_to_another_directory(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    arguments = ("--state-dir", str(state))
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *arguments) as process, kt.connect(process.address) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32")
        run.save_checkpoint("real")
        (state / "checkpoints" / "real").rename(tmp_path / "elsewhere")
        (state / "checkpoints" / "real").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(kt.KtExpertError, match="could not be read"):
            run.load_checkpoint("real")
