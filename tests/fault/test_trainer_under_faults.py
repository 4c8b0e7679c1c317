"""A stock Trainer behind a proxy that cuts its connections, on a server that is killed again and again."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import RunOptions
from peft import get_peft_model
from support.proxy import FaultProxy, SameHostProxy
from support.server import ServerProcess
from support.sockets import free_port
from support.training import SEED, history, lora_config, trainer
from transformers import AutoModelForCausalLM, TrainerCallback

from fault.test_reconnecting import Restartable, through

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

STEPS = 60
RESTARTS_AT = (7, 19, 30, 41, 52)
MEAN_CUT_S = 2.0


def offloaded(checkpoint: Path, address: str, options: RunOptions | None = None) -> Any:
    torch.manual_seed(SEED)
    with kt.offload_experts(address, options):
        base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return get_peft_model(base, lora_config())


class Between(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, action: Any) -> None:
        self._action = action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._action(state.global_step)


def adapter_of(model: Any, directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    model.save_pretrained(directory)
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["stream", "tcp", "same-host"])
def test_sixty_steps_with_cuts_and_restarts_end_with_the_same_bits(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(offloaded(qwen3_checkpoint, server.address), tmp_path / "a", max_steps=STEPS)
    made.train()
    expected, losses = adapter_of(made.model, tmp_path / "expected"), history(made)

    own, cut_off = tmp_path / "own", tmp_path / "cut"
    monkeypatch.setenv("KT_EXPERT_TRANSPORT", transport)
    monkeypatch.setenv("KT_EXPERT_SAME_HOST_DIR", str(cut_off))
    port = free_port()
    data = FaultProxy(f"127.0.0.1:{port}")
    options = ("--checkpoint-every", "3", "--same-host", str(own), *through(data, port))
    restartable = Restartable(qwen3_checkpoint, tmp_path, *options)
    rng, stop = random.Random(5), threading.Event()

    def restart(step: int) -> None:
        if step in RESTARTS_AT:
            restartable.kill()
            restartable.start()

    with FaultProxy(restartable.address) as proxy, SameHostProxy(own, cut_off) as other, data:

        def cut() -> None:
            while not stop.wait(rng.expovariate(1 / MEAN_CUT_S)):
                for each in (proxy, other, data):
                    each.cut()

        model = offloaded(qwen3_checkpoint, proxy.address, RunOptions(replay_window=0.5))
        disturbed = trainer(model, tmp_path / "b", max_steps=STEPS)
        disturbed.add_callback(Between(restart))
        thread = threading.Thread(target=cut)
        thread.start()
        try:
            disturbed.train()
            got = adapter_of(disturbed.model, tmp_path / "got")
        finally:
            stop.set()
            thread.join()
        assert restartable.starts == 1 + len(RESTARTS_AT)
        assert history(disturbed) == losses
        assert got.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in got.items())
        disturbed.model.base_model.model.kt_expert_offload.close()
    restartable.process.stop()


@pytest.mark.timeout(600)
def test_without_replay_the_loss_is_told_and_the_trainers_checkpoint_continues_to_the_same_bits(
    server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path
) -> None:
    made = trainer(offloaded(qwen3_checkpoint, server.address), tmp_path / "a", max_steps=12)
    made.train()
    expected = adapter_of(made.model, tmp_path / "expected")

    restartable = Restartable(qwen3_checkpoint, tmp_path)

    def restart(step: int) -> None:
        if step == 8 and restartable.starts == 1:
            restartable.kill()
            restartable.start()

    saving = {"save_strategy": "steps", "save_steps": 5}
    first = trainer(offloaded(qwen3_checkpoint, restartable.address), tmp_path / "b", max_steps=12, **saving)
    first.add_callback(Between(restart))
    with pytest.raises(kt.RunStateLost, match="go on from step"):
        first.train()
    again = trainer(offloaded(qwen3_checkpoint, restartable.address), tmp_path / "b", max_steps=12, **saving)
    again.train(resume_from_checkpoint=True)
    got = adapter_of(again.model, tmp_path / "got")
    assert all(torch.equal(value, expected[key]) for key, value in got.items())
    restartable.process.stop()
