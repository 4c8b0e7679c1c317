"""The demo's text: English prose that every Python ships, as bytes."""

from __future__ import annotations

from pydoc_data import topics

import torch

VOCABULARY = 256
HELD_OUT_FRACTION = 0.1


def text_bytes() -> torch.Tensor:
    """All help topics in a fixed order, as a 1-D int64 tensor of bytes."""
    text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    return torch.frombuffer(bytearray(text.encode("utf-8")), dtype=torch.uint8).long()


def splits() -> tuple[torch.Tensor, torch.Tensor]:
    """The part the base model learns from, and the held-out part the fine-tuning uses."""
    data = text_bytes()
    cut = int(len(data) * (1 - HELD_OUT_FRACTION))
    return data[:cut], data[cut:]


class Windows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Non-overlapping windows of one length; labels are the inputs, as causal language models take them."""

    def __init__(self, data: torch.Tensor, length: int, count: int) -> None:
        self._windows = data[: count * length].view(count, length)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self._windows[index]
        return {"input_ids": window, "labels": window.clone()}
