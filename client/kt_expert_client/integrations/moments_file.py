"""The server's optimizer state beside a trainer's own checkpoint files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kt_expert_client.adapter import AdapterTensors, TensorKey
from kt_expert_client.errors import InvalidRequest

FILE_NAME = "kt_expert_optimizer.safetensors"
_STEP_KEY = "step"


@dataclass(frozen=True, slots=True)
class Moments:
    """What the optimizer keeps, with how many updates each tensor has seen, and the steps of the run."""

    tensors: AdapterTensors
    step: int


def write(directory: Path, moments: Moments) -> None:
    """Keys are <layer>.<part>.<tensor>; the step is in the file's metadata."""
    content = {f"{key.layer}.{key.part}.{key.tensor}": value for key, value in moments.tensors.items()}
    save_file(content, directory / FILE_NAME, metadata={_STEP_KEY: str(moments.step)})


def read(directory: Path) -> Moments | None:
    """None where the directory has no such file. Raises InvalidRequest for one that is damaged."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    tensors: AdapterTensors = {}
    with safe_open(path, framework="pt") as file:
        step = (file.metadata() or {}).get(_STEP_KEY, "")
        for name in file.keys():  # noqa: SIM118  # not a mapping
            parts = name.split(".")
            if len(parts) != 3 or not parts[0].isdigit() or not step.isdigit():
                raise InvalidRequest(f"{path} is not a kt-expert optimizer file: tensor {name!r}, step {step!r}")
            value: torch.Tensor = file.get_tensor(name)
            tensors[TensorKey(int(parts[0]), parts[2], parts[1])] = value
    return Moments(tensors, int(step))
