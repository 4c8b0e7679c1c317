"""What a trainer notices of a hostile or stalled client, and whether a busy server answers: python -m neighbours FILE.json

Throughput alone and beside the other client, taken in turns in one run; and the time `/metrics`, `/readyz` and the gRPC health
check take while two trainers keep every core of the engine busy.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpc
import kt_expert_client as kt
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kt_expert_client import LayerLora, Run
from support.server import ServerProcess
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from neighbours.hostile import KINDS

_TURN_S = 3.0
_TURNS = 7
_ASKED = 200
# A layer as Qwen3-30B-A3B's, with fewer experts: what a trainer waits for is the kernels, as in a real training.
_HIDDEN, _INTERMEDIATE, _EXPERTS, _TOP_K, _TOKENS = 2048, 768, 16, 8, 256
_LORA = [LayerLora(0, True, 16, 16, 16, 2.0, 2.0, 2.0)]


def save_model(directory: Path) -> Path:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=_HIDDEN, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, head_dim=16,
        intermediate_size=64, moe_intermediate_size=_INTERMEDIATE, num_experts=_EXPERTS, num_experts_per_tok=_TOP_K,
        max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


def one_round(run: Run) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, _HIDDEN, generator=generator)
    ids = torch.rand(_TOKENS, _EXPERTS, generator=generator).topk(_TOP_K).indices
    weights = torch.rand(_TOKENS, _TOP_K, generator=generator)
    handle = run.submit_forward(0, x, ids, weights)
    output = handle.result()
    grad, _ = run.submit_backward(0, handle.ticket, output, replace_gradients=True).result()
    return grad


def rounds_per_second(run: Run, expected: torch.Tensor) -> float:
    begun, count = time.monotonic(), 0
    while time.monotonic() < begun + _TURN_S:
        assert torch.equal(one_round(run), expected), "the neighbour changed a bit"
        count += 1
    return count / (time.monotonic() - begun)


def beside(server: ServerProcess, run: Run, kind: str) -> float:
    """Throughput beside that client over throughput without it."""
    expected = one_round(run)
    ratios = []
    for _ in range(_TURNS):
        alone = rounds_per_second(run, expected)
        command = [sys.executable, "-m", "neighbours.hostile", server.address, kind, str(_HIDDEN)]
        with subprocess.Popen(command, cwd=Path(__file__).parent.parent) as hostile:
            time.sleep(2.0)  # until it is at it
            together = rounds_per_second(run, expected)
            assert hostile.poll() is None, f"{kind} has ended"
            hostile.kill()
        ratios.append(together / alone)
    return statistics.median(ratios)


def slowest(ask: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of many questions."""
    times = []
    for _ in range(_ASKED):
        begun = time.monotonic()
        ask()
        times.append(1000 * (time.monotonic() - begun))
        time.sleep(0.01)
    return {"median_ms": statistics.median(times), "p99_ms": sorted(times)[int(0.99 * _ASKED)], "most_ms": max(times)}


def answers_under_load(server: ServerProcess) -> dict[str, dict[str, float]]:
    stop = threading.Event()

    def train() -> None:
        with kt.connect(server.address) as client:
            run = client.open_run(lora=_LORA, wire_dtype="fp32")
            while not stop.is_set():
                one_round(run)

    threads = [threading.Thread(target=train) for _ in range(2)]
    for thread in threads:
        thread.start()
    with grpc.insecure_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        pages = {
            page: slowest(lambda page=page: urllib.request.urlopen(f"http://{server.metrics_address}{page}").read())
            for page in ("/metrics", "/readyz")
        }
        pages["grpc health"] = slowest(lambda: health.Check(health_pb2.HealthCheckRequest(service="")))
    stop.set()
    for thread in threads:
        thread.join()
    return pages


def main(path: Path) -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = save_model(directory / "model")
        with ServerProcess(model, directory / "log", "--lease", "2", "--retention", "2") as server:
            with kt.connect(server.address) as client:
                run = client.open_run(lora=_LORA, wire_dtype="fp32")
                ratios = {kind: beside(server, run, kind) for kind in KINDS}
            answers = answers_under_load(server)
    path.write_text(json.dumps({"throughput_beside": ratios, "answers_under_load": answers}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
