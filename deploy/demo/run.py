"""The demo: fine-tune one checkpoint twice from the same seeds, with the experts in process and on a server, and compare."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.request
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
WEIGHTS_SERIES = 'kt_expert_memory_bytes{kind="weights"}'
MAX_LOSS_DIFF = 2e-3
MAX_REL_GRAD_NORM_DIFF = 1e-2
MAX_LOGIT_DIFF = 2e-2


@dataclass(frozen=True)
class Report:
    """build/demo/report.json. Differences are between the in-process run and the run through the server."""

    steps: int
    max_loss_diff: float
    max_rel_grad_norm_diff: float
    adapter_logit_diff: float
    loss_first: float
    loss_last: float
    client_expert_parameters: int
    server_rss_bytes: int
    weight_bytes: int
    seconds_in_process: float
    seconds_through_server: float

    def failures(self) -> list[str]:
        checks = {
            f"max_loss_diff {self.max_loss_diff:.2e} > {MAX_LOSS_DIFF}": self.max_loss_diff > MAX_LOSS_DIFF,
            f"max_rel_grad_norm_diff {self.max_rel_grad_norm_diff:.2e} > {MAX_REL_GRAD_NORM_DIFF}": (
                self.max_rel_grad_norm_diff > MAX_REL_GRAD_NORM_DIFF
            ),
            f"adapter_logit_diff {self.adapter_logit_diff:.2e} > {MAX_LOGIT_DIFF}": self.adapter_logit_diff > MAX_LOGIT_DIFF,
            f"the loss did not fall: {self.loss_first:.3f} to {self.loss_last:.3f}": self.loss_last >= self.loss_first,
            f"the trainer holds {self.client_expert_parameters} expert parameters": self.client_expert_parameters != 0,
        }
        return [message for message, failed in checks.items() if failed]


class ServerProcess:
    """kt-expert-server as a user starts it."""

    def __init__(self, model: Path, log: Path) -> None:
        self._log = log.open("w", encoding="utf-8")
        command = [
            "kt-expert-server",
            "--model",
            str(model),
            "--listen",
            "127.0.0.1:0",
            "--metrics-listen",
            "127.0.0.1:0",
        ]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        assert self._process.stdout is not None
        ready = self._process.stdout.readline().split()
        if not ready or ready[0] != "ready":
            raise SystemExit(f"the server did not start; see {log}")
        self.address = ready[1].removeprefix("grpc=")
        self._metrics = ready[2].removeprefix("metrics=")

    def rss_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def weight_bytes(self) -> int:
        """Expert weights resident on the server, from its own metrics."""
        with urllib.request.urlopen(f"http://{self._metrics}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return int(float(next(line for line in lines if line.startswith(WEIGHTS_SERIES)).rsplit(" ", 1)[1]))

    def stop(self) -> None:
        self._process.terminate()
        status = self._process.wait(STOP_TIMEOUT_S)
        self._log.close()
        if status != 0:
            raise SystemExit(f"the server ended with status {status} after SIGTERM, expected 0")


def base_checkpoint(out: Path, steps: int) -> Path:
    """The base model, trained once per recipe and kept."""
    recipe = hashlib.sha256((HERE / "base_model.py").read_bytes() + (HERE / "corpus.py").read_bytes() + str(steps).encode())
    path = out / "cache" / f"base-{recipe.hexdigest()[:16]}"
    if not (path / "model.safetensors").exists():
        partial = path.with_suffix(".partial")
        run_script("base_model.py", ["--out", str(partial), "--steps", str(steps)], {})
        partial.rename(path)
    return path


def run_script(name: str, arguments: list[str], extra_environment: dict[str, str]) -> float:
    environment = {key: value for key, value in os.environ.items() if key != "KT_EXPERT_SERVER"}
    environment |= {"PYTHONWARNINGS": "ignore::FutureWarning"} | extra_environment  # PEFT's and transformers' own affairs
    begun = time.monotonic()
    subprocess.run([sys.executable, str(HERE / name), *arguments], check=True, env=environment)
    return time.monotonic() - begun


def finetune(base: Path, out: Path, steps: int, environment: dict[str, str]) -> tuple[dict[str, Any], float]:
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["--model", str(base), "--out", str(out), "--steps", str(steps)]
    seconds = run_script("finetune.py", arguments, environment)
    result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return result, seconds


def adapter_logit_diff(base: Path, remote: Path) -> float:
    """Largest difference between the logits of the remote model and of stock PEFT with the adapter it saved."""
    probe = load_file(remote / "probe.safetensors")
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(stock, remote / "adapter").eval()
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"]).logits
    return float((logits - probe["logits"]).abs().max())


def print_history(local: list[dict[str, float]], remote: list[dict[str, float]]) -> None:
    table = Table(title="one script, two places for the experts")
    table.add_column("step", justify="right")
    for heading in ("loss in process", "loss via server", "grad norm in process", "grad norm via server"):
        table.add_column(heading, justify="right")
    for ours, theirs in zip(local, remote, strict=True):
        table.add_row(
            f"{ours['step']:.0f}", f"{ours['loss']:.5f}", f"{theirs['loss']:.5f}", f"{ours['grad_norm']:.5f}",
            f"{theirs['grad_norm']:.5f}",
        )  # fmt: skip
    Console(width=100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fine-tune a small MoE in process and through kt-expert-server.")
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--base-steps", type=int, default=300, help="steps that train the base model, once")
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of each fine-tuning")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)

    print("1. a base checkpoint (kept for the next time)", flush=True)
    base = base_checkpoint(options.out, options.base_steps)
    print("2. fine-tuning with the experts in process", flush=True)
    local, local_seconds = finetune(base, options.out / "in-process", options.steps, {})
    print("3. the same script with the experts on kt-expert-server", flush=True)
    server = ServerProcess(base, options.out / "server.log")
    try:
        environment = {"KT_EXPERT_SERVER": server.address}
        remote, remote_seconds = finetune(base, options.out / "through-server", options.steps, environment)
        rss, weights = server.rss_bytes(), server.weight_bytes()
    finally:
        server.stop()
    print_history(local["history"], remote["history"])
    pairs = list(zip(local["history"], remote["history"], strict=True))
    report = Report(
        steps=len(pairs),
        max_loss_diff=max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        max_rel_grad_norm_diff=max(abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"] for a, b in pairs),
        adapter_logit_diff=adapter_logit_diff(base, options.out / "through-server"),
        loss_first=remote["history"][0]["loss"],
        loss_last=remote["history"][-1]["loss"],
        client_expert_parameters=remote["expert_parameters"],
        server_rss_bytes=rss,
        weight_bytes=weights,
        seconds_in_process=local_seconds,
        seconds_through_server=remote_seconds,
    )
    (options.out / "report.json").write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    for name, value in asdict(report).items():
        print(f"  {name:26} {value:.6g}" if isinstance(value, float) else f"  {name:26} {value}")
    for failure in report.failures():
        print(f"FAILED: {failure}")
    return 1 if report.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
