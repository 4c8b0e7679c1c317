"""The memory plan: what the server will hold, printed and checked against the limit before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from kt_expert_server.errors import ModelError
from kt_expert_server.model.index import ModelPlan
from kt_expert_server.model.loader import resident_bytes

RUNTIME_BYTES = 300 * 1024**2  # interpreter, libraries, gRPC arenas and the engine's packing buffers
EXAMPLE_RANK = 16
EXAMPLE_TOKENS = 4096
_FP32_BYTES = 4
_OPTIMIZER_COPIES = 4  # parameters, gradients, and AdamW's two moments, all fp32


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes."""

    weights: int
    runtime: int
    limit: int
    adapter_example: int
    ticket_example: int
    nodes: int = 1

    @property
    def required(self) -> int:
        return self.weights + self.runtime

    def check(self) -> None:
        """Raises ModelError with the numbers where the weights do not fit."""
        if self.required > self.limit:
            raise ModelError(
                f"the model needs {format_bytes(self.required)} ({format_bytes(self.weights)} of weights and "
                f"{format_bytes(self.runtime)} to run) and the limit is {format_bytes(self.limit)}; use a host with more "
                "memory or raise --memory-limit"
            )

    def lines(self, threads: int) -> list[str]:
        free = self.limit - self.required
        return [
            f"  weights            {format_bytes(self.weights):>12}  resident once, for forward and backward",
            *self._node_lines(),
            f"  runtime            {format_bytes(self.runtime):>12}  interpreter, libraries, scratch of {threads} threads",
            f"  left for runs      {format_bytes(free):>12}  adapters, gradients, optimizer, tickets",
            f"  limit              {format_bytes(self.limit):>12}",
            f"  for example, a run of rank {EXAMPLE_RANK} on every layer takes {format_bytes(self.adapter_example)}, and "
            f"{format_bytes(self.ticket_example)} of tickets per {EXAMPLE_TOKENS} tokens in flight through all layers",
        ]

    def _node_lines(self) -> list[str]:
        if self.nodes == 1:
            return []
        return [
            f"    each of {self.nodes} nodes    {format_bytes(self.weights / self.nodes):>12}  cut along the intermediate size"
        ]


def plan_memory(model: ModelPlan, weight_format: str, limit: int, nodes: int = 1) -> MemoryPlan:
    adapter = ticket = 0
    for layer in model.layers:
        per_expert = EXAMPLE_RANK * (2 * layer.hidden_size + 3 * layer.intermediate_size)
        adapter += layer.num_experts * per_expert * _FP32_BYTES * _OPTIMIZER_COPIES
        saved = layer.hidden_size * 2 + layer.top_k * 2 * layer.intermediate_size * _FP32_BYTES
        ticket += EXAMPLE_TOKENS * saved
    return MemoryPlan(resident_bytes(model, weight_format, nodes), RUNTIME_BYTES, limit, adapter, ticket, nodes)


def format_bytes(size: float) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
