"""Several runs at once on one server: each gets the bits it would get alone, whether or not its passes were shared."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import AdamW
from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.bench.tenants import measure_tenants, plot_tenants, print_tenants, tenant_cases, tenants_as_json
from rich.console import Console
from support.batches import LORA, train_step
from support.server import ServerProcess

RUNS, STEPS = 4, 6
MOST_ROUNDS = 20  # of all runs, until some of their passes have met


@pytest.fixture
def quiet_server(qwen3_checkpoint: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", "--data-listen", "127.0.0.1:0") as server:
        yield server


def trained(address: str, seed: int, transport: str) -> list[torch.Tensor]:
    """The last outputs of each step."""
    with kt.connect(address, transport=transport) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32", seed=seed)
        outputs = []
        for step in range(STEPS):
            outputs.append(train_step(run, 100 * seed + step, tokens=3 + seed))
            run.step(AdamW(1e-2))
        run.leave()
    return outputs


def shared_batches(server: ServerProcess) -> float:
    return sum(server.metric(f'kt_expert_shared_batches_total{{pass="{each}"}}') for each in ("forward", "backward"))


def test_runs_that_share_passes_get_their_own_bits(quiet_server: ServerProcess) -> None:
    transports = [("stream", "same-host", "tcp")[seed % 3] for seed in range(RUNS)]
    alone = [trained(quiet_server.address, seed, transport) for seed, transport in enumerate(transports)]
    assert shared_batches(quiet_server) == 0
    found: dict[int, list[torch.Tensor]] = {}

    def train(seed: int) -> None:
        found[seed] = trained(quiet_server.address, seed, transports[seed])

    for _ in range(MOST_ROUNDS):
        threads = [threading.Thread(target=train, args=(seed,)) for seed in range(RUNS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, expected in enumerate(alone):
            assert all(map(torch.equal, found[seed], expected)), f"run {seed} differs from itself alone"
        if shared_batches(quiet_server):
            return
    pytest.fail(f"no two passes met in {MOST_ROUNDS} rounds of {RUNS} runs")


def test_the_benchmark_of_tenants_has_every_case(tmp_path: Path) -> None:
    found = measure_tenants(1, 1, LayerShape("tiny", 8, 256, 128, 2), round_s=0.05)
    assert [(each.runs, each.tokens) for each in found] == [(each.runs, each.tokens) for each in tenant_cases()]
    assert all(each.median > 0 for each in found)
    report = tenants_as_json(found)
    assert report.keys() == {
        "runs_1", "runs_2", "runs_4", "runs_8", "one_run_4t", "of_one_batch_8", "of_one_batch_16", "of_one_batch_32",
    }  # fmt: skip
    console = Console(record=True, width=140)
    print_tenants(console, found)
    assert "4 runs of 16 tokens" in console.export_text()
    plot_tenants(found, tmp_path / "tenants.svg")
    assert (tmp_path / "tenants.svg").stat().st_size > 0
