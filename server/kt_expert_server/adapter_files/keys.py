"""Names of experts' LoRA in adapter files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from kt_expert_server.adapter_files.files import PREFIX

_PER_EXPERT = re.compile(
    r"(?P<path>.*\blayers\.(?P<layer>\d+)\.[\w.]*\bexperts)\.(?P<expert>\d+)\.(?P<name>\w+)\.lora_(?P<side>[AB])\.weight"
)
_FUSED = re.compile(
    r"(?P<path>.*\blayers\.(?P<layer>\d+)\.[\w.]*\bexperts)(?P<inner>\.base_layer)?\.lora_(?P<side>[AB])\.weight"
)  # fmt: skip
PROJECTION_OF = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


@dataclass(frozen=True, slots=True)
class ExpertKey:
    """One tensor of experts: of one expert's projection, or fused, of all experts' (`inner`: PEFT's inner wrapper)."""

    key: str
    path: str  # of the experts module, without PEFT's prefix
    layer: int
    side: str  # A or B
    expert: int | None = None
    name: str = ""  # gate_proj, w1, ...
    inner: bool = False


def expert_keys(keys: Iterable[str]) -> list[ExpertKey]:
    """Those of experts, in order."""
    found = []
    for key in sorted(keys):
        name = key.removeprefix(PREFIX)
        if match := _PER_EXPERT.fullmatch(name):
            found.append(ExpertKey(key, match["path"], int(match["layer"]), match["side"], int(match["expert"]), match["name"]))
        elif match := _FUSED.fullmatch(name):
            found.append(ExpertKey(key, match["path"], int(match["layer"]), match["side"], inner=bool(match["inner"])))
    return found
