"""Tensors on a GPU: pinned staging on a side stream gives the numbers the CPU path gives."""

from __future__ import annotations

from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import AdamW, LayerLora
from support.models import random_tokens
from support.server import ServerProcess
from support.training import adapted

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*(gradient|activation)_checkpointing.*:FutureWarning"),
]
LORA = [LayerLora(0, True, 4, 4, 4, 2.0, 2.0, 2.0)]


def test_gpu_tensors_give_the_bits_of_cpu_tensors(server: ServerProcess) -> None:
    """Many requests in flight over one pool of pinned buffers, each checked against the CPU's answer."""
    with kt.connect(server.address) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32")
        generator = torch.Generator().manual_seed(0)
        for round_number in range(20):
            tokens = 50 + 37 * round_number
            x = torch.randn(tokens, 32, generator=generator)
            ids = torch.rand(tokens, 8, generator=generator).topk(2).indices
            weights = torch.rand(tokens, 2, generator=generator)
            on_cpu = run.submit_forward(0, x, ids, weights)
            # The input is still being computed on the current stream when it is submitted.
            busy = torch.randn(2048, 2048, device="cuda")
            zero = (busy @ busy @ busy).sum() * 0
            on_gpu = run.submit_forward(0, x.cuda() + zero, ids.cuda(), weights.cuda())
            expected, got = on_cpu.result(), on_gpu.result()
            assert got.is_cuda
            assert torch.equal(got.cpu(), expected)
            backward = [run.submit_backward(0, handle.ticket, output) for handle, output in ((on_cpu, expected), (on_gpu, got))]
            (dx, dw), (gpu_dx, gpu_dw) = (handle.result() for handle in backward)
            assert torch.equal(gpu_dx.cpu(), dx)
            assert torch.equal(gpu_dw.cpu(), dw)
        assert run.step(AdamW(1e-3)) == 1


def test_training_on_a_gpu_follows_the_cpu(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    losses = []
    for device in ("cpu", "cuda"):
        model = adapted(qwen3_checkpoint, server.address).to(device)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for step in range(5):
            tokens = random_tokens(2, 16, seed=step).to(device)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
