"""The loop of docs/two-micro-batches.md: the second micro-batch's call is sent before anybody waits for the first one's."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e.test_docs import ROOT, blocks
from kt_expert_client.integrations.transformers import OFFLOADER
from kt_expert_client.profile.times import CallTimes
from support.models import CONFIGS
from support.server import ServerProcess

PAGE = ROOT / "docs" / "two-micro-batches.md"
LAYERS = CONFIGS["qwen3_moe"].num_hidden_layers


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_both_are_in_flight(server: ServerProcess, qwen3_checkpoint: Path, op: str) -> None:
    code, stock = blocks(PAGE, "python", server, qwen3_checkpoint).split("# The same as one batch after the other.")
    assert "stock.backward()" in stock
    heard: list[CallTimes] = []
    OFFLOADER.client(server.address).recorder.listen(heard.append)
    exec(compile(code, str(PAGE), "exec"), {})  # noqa: S102  # our own page
    calls = [each for each in heard if each.op == op]
    assert len(calls) == 2 * LAYERS
    for layer in range(LAYERS):
        first, second = sorted((each for each in calls if each.layer == layer), key=lambda each: each.stamps.asked)
        assert second.stamps.sent < first.wanted, f"layer {layer}: the second call was sent after the first one was waited for"
