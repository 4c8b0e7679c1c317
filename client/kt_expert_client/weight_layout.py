"""Expert weights between transformers' fused parameters and the server's tensors.

transformers keeps gate_up_proj as [E, 2I, H] and down_proj as [E, H, I], or where a class says is_transposed as [E, H, 2I] and
[E, I, H]; biases as [E, 2I] and [E, H]. Gate and up are concatenated, or interleaved. The server has w_gate and w_up [E, I, H],
w_down [E, H, I] and biases [E, 1, columns].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kt_expert_client import peft_layout


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a class keeps them."""

    transposed: bool
    interleaved: bool

    def gate_up_to_stock(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self._to_stock(peft_layout.join_gate_up(gate, up, interleaved=self.interleaved))

    def gate_up_from_stock(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return peft_layout.split_gate_up(self._from_stock(values), interleaved=self.interleaved)

    def gate_up_bias_to_stock(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        joined = peft_layout.join_gate_up(gate.transpose(1, 2), up.transpose(1, 2), interleaved=self.interleaved)
        return joined.squeeze(2)

    def gate_up_bias_from_stock(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = peft_layout.split_gate_up(values.unsqueeze(2), interleaved=self.interleaved)
        return gate.transpose(1, 2).contiguous(), up.transpose(1, 2).contiguous()

    def down_to_stock(self, down: torch.Tensor) -> torch.Tensor:
        return self._to_stock(down)

    def down_from_stock(self, values: torch.Tensor) -> torch.Tensor:
        return self._from_stock(values)

    def _to_stock(self, values: torch.Tensor) -> torch.Tensor:
        return values.transpose(1, 2).contiguous() if self.transposed else values

    def _from_stock(self, values: torch.Tensor) -> torch.Tensor:
        return values.transpose(1, 2).contiguous() if self.transposed else values
