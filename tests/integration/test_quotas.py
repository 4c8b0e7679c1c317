"""What one identity may have, and trainers that wait for their share."""

from __future__ import annotations

import threading
from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import Client, Run
from support.batches import LORA, batch
from support.server import ServerProcess
from support.waiting import wait_until

TOKENS = 2000
GIB = 1024**3


def forward(run: Run) -> kt.ForwardHandle:
    return run.submit_forward(0, *batch(TOKENS, 0))


def ticket_bytes(client: Client) -> int:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    forward(run).result()
    size = next(member.ticket_bytes for each in client.status().runs for member in each.members if each.run == run.name)
    run.leave()
    return int(size)


def test_a_trainer_waits_until_its_share_is_free(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    with kt.connect(server.address) as client:
        size = ticket_bytes(client)
    quota = f"tickets={1.7 * size / GIB:.9f}"
    with (
        ServerProcess(qwen3_checkpoint, tmp_path / "log", "--quota", quota) as bounded,
        kt.connect(bounded.address) as client,
    ):
        first, second = (client.open_run(lora=LORA, wire_dtype="fp32", seed=7) for _ in range(2))
        held = forward(first)
        expected = held.result()
        outputs: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: outputs.append(forward(second).result()))
        thread.start()
        twice = 'kt_expert_rejected_total{reason="RESOURCE_EXHAUSTED"} 2.0'
        wait_until(lambda: twice in bounded.get("/metrics")[1], what="a second refusal")
        assert not outputs
        first.submit_backward(0, held.ticket, expected).result()
        thread.join(60)
        assert torch.equal(outputs[0], expected)
        second.submit_forward(0, *batch(TOKENS, 0), save_for_backward=False).result()
        with pytest.raises(kt.OutOfCapacity, match=r"all trainers together may have .* of tickets"):
            forward(second).result()  # what it has is its own: nobody else could make room
