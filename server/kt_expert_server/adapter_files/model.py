"""What reading an adapter needs to know of its base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kt_expert_server.model.architecture import FAMILIES
from kt_expert_server.model.index import ModelPlan, plan_model

_WITHOUT_CONVERSION = ("gpt_oss", "granitemoe", "qwen2_moe")  # PEFT 0.21 does not convert names per expert for these
_WITHOUT_LORA_IN_ENGINES = ("granitemoe",)  # vLLM 0.33 and SGLang 0.5.23 have no names for LoRA on its experts


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, slots=True)
class BaseOfAdapter:
    """Sizes by layer, and how the family's experts are called and kept."""

    model_type: str
    layers: dict[int, ExpertSizes]
    block: str  # mlp or block_sparse_moe: between layers.N. and experts, in names per expert
    names: tuple[str, str, str]  # of gate, up and down per expert
    interleaved: bool  # gate and up take turns in the fused form
    transposed: bool  # the fused parameter is [E, in, out]

    @property
    def is_fused_in_vllm(self) -> bool:
        return self.model_type == "gpt_oss"

    @property
    def converts_per_expert(self) -> bool:
        """Whether PEFT reads names per expert."""
        return self.model_type not in _WITHOUT_CONVERSION

    @property
    def is_served_with_lora(self) -> bool:
        """Whether any serving engine reads LoRA on its experts."""
        return self.model_type not in _WITHOUT_LORA_IN_ENGINES

    def path(self, layer: int) -> str:
        """Of a layer's experts module in names per expert."""
        return f"model.layers.{layer}.{self.block}.experts"

    def fused_path(self, layer: int) -> str:
        """Of a layer's experts module in transformers, which is where PEFT's fused form is."""
        return f"model.layers.{layer}.{'block_sparse_moe' if self.model_type == 'granitemoe' else 'mlp'}.experts"


def base_of_adapter(directory: Path) -> BaseOfAdapter:
    """Raises ModelError for a directory without a model that is served."""
    return base_of_plan(plan_model(directory))


def base_of_plan(plan: ModelPlan) -> BaseOfAdapter:
    """The same of a model that was looked at."""
    namings = FAMILIES[plan.model_type].namings
    separate = next((each for each in namings if each.per_expert is not None), None)
    names = ("gate_proj", "up_proj", "down_proj")
    if separate is not None and separate.per_expert is not None and ".w1." in separate.per_expert[0]:
        names = ("w1", "w3", "w2")
    is_gpt_oss = FAMILIES[plan.model_type].gpt_oss
    sizes = {each.layer: ExpertSizes(each.num_experts, each.hidden_size, each.intermediate_size) for each in plan.layers}
    block = "mlp" if separate is None else separate.block
    return BaseOfAdapter(plan.model_type, sizes, block, names, is_gpt_oss, is_gpt_oss)
