"""Whether an adapter is served as it was trained."""

from __future__ import annotations

from collections.abc import Iterable

from kt_expert_server.adapter_files.files import AdapterFiles
from kt_expert_server.adapter_files.lora import Layers, difference
from kt_expert_server.adapter_files.model import BaseOfAdapter
from kt_expert_server.adapter_files.readers import READERS

_SHOWN = 3  # differences in one sentence


def verdicts(files: AdapterFiles, base: BaseOfAdapter, trained: Layers, readers: Iterable[str]) -> dict[str, str]:
    """By reader: why what it computes is not what was trained; "" where it is. Raises InvalidRequest for a broken file."""
    found = {}
    for name in readers:
        reading = READERS[name](files, base)
        if reading.refused:
            found[name] = f"refuses it: {reading.refused}"
        elif reading.dropped:
            found[name] = f"drops {len(reading.dropped)} tensors without a word, the first {reading.dropped[0]}"
        else:
            found[name] = "; ".join(difference(reading.layers, trained)[:_SHOWN])
    return found
