"""The trainer's side, measured in a process of its own with the client package, which this one does not import."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from kt_expert_server.errors import InvalidRequest

_MIB = 1024 * 1024
_MS_PER_S = 1000.0


def measure_trainer(layers: int, experts: int, rank: int, repeats: int) -> dict[str, Any]:
    """Raises InvalidRequest where the client cannot be run, with what it says."""
    arguments = (("layers", layers), ("experts", experts), ("rank", rank), ("repeats", repeats))
    result = subprocess.run(
        [sys.executable, "-m", "kt_expert_client.bench", *(f"--{name}={value}" for name, value in arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise InvalidRequest(f"bench trainer needs kt-expert[transformers]: {result.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def print_trainer(console: Console, found: Mapping[str, Any]) -> None:
    console.print(
        f"{found['layers']} layers, {found['remote_tensors']} remote tensors, one layer's LoRA "
        f"{found['layer_lora_bytes'] / _MIB:.0f} MiB"
    )
    console.print(
        f"PEFT makes the adapter in {found['injection_s']:.1f} s with a peak of {found['injection_peak_bytes'] / _MIB:.0f} MiB"
        f", {found['peak_in_layers']:.2f} of one layer's LoRA"
    )
    console.print(
        f"clipping, step and zero_grad: {found['step_s'] * _MS_PER_S:.1f} ms in {found['step_requests']} requests, beside the "
        "server's time"
    )
