"""LoRA of wrapped layers as kt-kernel saves it (kt_kernel/sft/lora.py, 0.7.2): fused_expert_lora.safetensors.

`kt-expert checkpoint export-adapter` and `import-adapter` read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from kt_expert_client.errors import InvalidRequest
from kt_expert_client.integrations.kt_kernel.wrapper import KTMoEWrapper

_TENSORS, _CONFIG = "fused_expert_lora.safetensors", "adapter_config.json"


def save_fused_expert_lora(wrappers: Sequence[KTMoEWrapper], folder: Path) -> None:
    """Writes the matrices of all these layers in fp32 and, where the folder has none, an adapter_config.json with their rank
    and alpha. Raises InvalidRequest for layers without LoRA, with different ranks or scales, or that are given twice."""
    forms = {(each.lora_rank, each.lora_alpha) for each in wrappers}
    layers = [each.layer_idx for each in wrappers]
    if len(forms) != 1 or len(set(layers)) != len(layers) or not all(each.lora for each in wrappers):
        raise InvalidRequest(
            f"layers {layers} have LoRA of (rank, alpha) {sorted(forms)}; expected each layer once, with LoRA of one rank and "
            "one alpha"
        )
    rank, alpha = forms.pop()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"layers.{wrapper.layer_idx}.experts.{name}": values.detach().cpu().float().contiguous()
        for wrapper in wrappers
        for name, values in wrapper.lora.items()
    }
    unfinished = folder / f".{_TENSORS}.tmp"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / _TENSORS)
    if not (folder / _CONFIG).exists():
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "target_modules": []}
        (folder / _CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
