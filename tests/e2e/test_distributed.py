"""Two ranks against one server are one trainer with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.models import load_stock, random_tokens
from support.server import ServerProcess
from support.training import adapted, history, logits, lora_config, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.*:FutureWarning")
WORKER = Path(__file__).resolve().parent.parent / "support" / "ddp_worker.py"


@pytest.mark.parametrize(
    ("targets", "location"),
    [("q_proj,v_proj", "server"), ("", "server"), ("q_proj,v_proj", "trainer")],
    ids=["attention and experts", "experts alone", "LoRA in the trainer"],
)
def test_two_ddp_ranks_equal_one_trainer_with_twice_the_batch(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, targets: str, location: str
) -> None:
    before = server.metric("kt_expert_tickets")  # of trainers that have vanished in other tests
    config = lora_config(target_modules=[name for name in targets.split(",") if name])
    model = adapted(qwen3_checkpoint, server.address, config)
    single = trainer(model, tmp_path / "single", per_device_train_batch_size=4)
    single.train()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(WORKER), str(qwen3_checkpoint), server.address, str(tmp_path / "double"), targets]
    (tmp_path / "double").mkdir()
    result = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "KT_EXPERT_LORA_LOCATION": location},
    )
    assert result.returncode == 0, result.stderr
    double = json.loads((tmp_path / "double" / "history.json").read_text())
    for (loss, norm, rate), (expected_loss, expected_norm, expected_rate) in zip(double, history(single), strict=True):
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
        assert rate == expected_rate
    tokens = random_tokens(2, 12)
    saved = PeftModel.from_pretrained(load_stock(qwen3_checkpoint), tmp_path / "double" / "adapter")
    assert (logits(saved, tokens) - logits(single.model, tokens)).abs().max() < 1e-4
    assert torch.isfinite(logits(saved, tokens)).all()
    assert server.metric("kt_expert_tickets") <= before


def test_the_environment_variable_and_one_import_are_enough(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path
) -> None:
    script = f"""
import kt_expert_client, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(qwen3_checkpoint)!r}, dtype=torch.float32)
print(sum(p.numel() for n, p in model.named_parameters() if ".experts." in n))
tokens = torch.arange(6)[None]
print(model.generate(input_ids=tokens, max_new_tokens=4, do_sample=False).tolist())
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "KT_EXPERT_SERVER": server.address},
    )
    assert result.returncode == 0, result.stderr
    stock = load_stock(qwen3_checkpoint)
    expected = stock.generate(input_ids=torch.arange(6)[None], max_new_tokens=4, do_sample=False)
    experts = sum(p.numel() for n, p in stock.named_parameters() if ".experts." in n)
    assert result.stdout.splitlines() == [str(experts), str(expected.tolist())]
