"""A loop whose optimizer does not hold the experts' parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.server import ServerProcess
from support.training import adapted

from ecosystem.case import loss_of
from ecosystem.table import Row

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own


def test_gradients_that_no_optimizer_takes_are_named(
    server: ServerProcess, qwen3_checkpoint: Path, table: list[Row]
) -> None:  # fmt: skip
    model = adapted(qwen3_checkpoint, server.address)
    others = [p for name, p in model.named_parameters() if p.requires_grad and ".experts." not in name]
    optimizer = torch.optim.AdamW(others, lr=1e-3)
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
    loss_of(model, 2).backward()
    said = "gradients of 12 expert parameters were left by the last 3 optimizer steps"
    with pytest.warns(UserWarning, match=said) as warnings:
        optimizer.step()
    loss_of(model, 3).backward()
    optimizer.step()  # said once
    (row,) = [str(each.message) for each in warnings if said in str(each.message)]
    other = adapted(qwen3_checkpoint, server.address)
    loss_of(other).backward()
    for step in range(5):  # of one model, while another one has gradients that nobody has cleared
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    table.append(
        Row("T37: no optimizer holds the experts' parameters", "equal", None, None, None, f"as stock, and a warning: {row}")
    )
