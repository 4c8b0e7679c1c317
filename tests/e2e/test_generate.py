"""Text that is generated token by token, by the quickest way there is to the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.case import loss_of, randomise
from support.batches import LAYERS
from support.models import random_tokens
from support.server import ServerProcess
from support.training import adapted

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own
FAST = 'kt_expert_fast_forwards_total{outcome="done"}'


def generate(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits."""
    made = model.generate(
        input_ids=prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return made.sequences, torch.stack(made.logits)


def test_small_forwards_and_ordinary_ones_generate_the_same(
    qwen3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the model trains in between."""
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for transport in ("stream", "same-host"):
        monkeypatch.setenv("KT_EXPERT_TRANSPORT", transport)
        with ServerProcess(qwen3_checkpoint, tmp_path / "log") as server:  # models of one process share a client of a server
            found[transport] = _life(server, qwen3_checkpoint, is_fast=transport == "same-host")
    for (left, left_logits), (right, right_logits) in zip(*found.values(), strict=True):
        assert left.shape == (1, 13)
        assert torch.equal(left, right)
        assert torch.equal(left_logits, right_logits)
    first, second = (logits for _, logits in found["stream"])
    assert not torch.equal(first, second), "the step changed nothing"


def _life(server: ServerProcess, checkpoint: Path, *, is_fast: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    model = adapted(checkpoint, server.address)
    randomise(model)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    generated = []
    for _ in range(2):
        before = server.metric(FAST)
        generated.append(generate(model, random_tokens(1, 5)))
        assert (server.metric(FAST) - before >= 6 * LAYERS) == is_fast
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return generated
