"""An offloaded layer's calls that were sent, until somebody waits for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kt_expert_client.parameters.mirror import MirrorMatrix
from kt_expert_client.run import BackwardHandle, ForwardHandle, Run

Keep = Callable[[Run, int, int], torch.Tensor]


class SentForward:
    """Implements ForwardResult. `keep` makes a tensor of a ticket."""

    def __init__(self, run: Run, handle: ForwardHandle, keep: Keep | None, top_k: int) -> None:
        self._run, self._keep, self._top_k = run, keep, top_k
        self._handle: ForwardHandle | None = handle

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._handle is not None  # noqa: S101  # once
        handle, self._handle = self._handle, None
        output = handle.result()
        if self._keep is None:
            return output, torch.zeros(1, dtype=torch.int64)
        return output, self._keep(self._run, handle.ticket, self._top_k)

    def abandon(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._run.abandon(handle)


class SentBackward:
    """Implements BackwardResult. Gradients of `mirrored` parameters, by their index, come with the answer."""

    def __init__(
        self,
        handle: BackwardHandle,
        gradients: list[torch.Tensor],
        mirrored: Sequence[tuple[int, MirrorMatrix, torch.Tensor]],
    ) -> None:
        self._handle, self._gradients, self._mirrored = handle, gradients, mirrored

    def wait(self) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        grad_hidden, grad_weights = self._handle.result()
        for index, mirror, parameter in self._mirrored:
            self._gradients[index] = mirror.gradient(parameter)
        return grad_hidden, grad_weights, self._gradients
