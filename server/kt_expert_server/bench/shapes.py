"""The layer a benchmark runs: a published model's, a checkpoint's, or four numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.index import plan_model


@dataclass(frozen=True, slots=True)
class LayerShape:
    """E experts of H x I, k of them per token."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int

    def flop(self, tokens: int) -> float:
        """Of one forward, and of one backward with a frozen base: six H x I products a route, LoRA not counted."""
        return 6.0 * tokens * self.top_k * self.hidden * self.intermediate


_PUBLISHED = (
    LayerShape("qwen3.5-35b-a3b", 256, 2048, 512, 8),
    LayerShape("qwen3-30b-a3b", 128, 2048, 768, 8),
    LayerShape("qwen3-235b", 128, 4096, 1536, 8),
    LayerShape("deepseek-v3", 256, 7168, 2048, 8),
    LayerShape("mixtral-8x7b", 8, 4096, 14336, 2),
    LayerShape("olmoe-1b-7b", 64, 2048, 1024, 8),
    LayerShape("gpt-oss-120b", 128, 2880, 2880, 4),
    LayerShape("tiny", 8, 256, 128, 2),
)
PUBLISHED = {shape.name: shape for shape in _PUBLISHED}
_NUMBERS = 4


def parse_shape(text: str) -> LayerShape:
    """Raises InvalidRequest, or ModelError for a directory that holds no experts."""
    if text in PUBLISHED:
        return PUBLISHED[text]
    if Path(text).is_dir():
        layer = plan_model(Path(text)).layers[0]
        return LayerShape(Path(text).name, layer.num_experts, layer.hidden_size, layer.intermediate_size, layer.top_k)
    parts = text.split(",")
    if len(parts) != _NUMBERS or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InvalidRequest(
            f"shape {text!r} is neither one of {', '.join(PUBLISHED)}, nor a model directory, nor E,H,I,k in numbers"
        )
    experts, hidden, intermediate, top_k = (int(part) for part in parts)
    if top_k > experts:
        raise InvalidRequest(f"shape {text!r} routes a token to {top_k} of {experts} experts; k may be at most E")
    return LayerShape(text, experts, hidden, intermediate, top_k)
