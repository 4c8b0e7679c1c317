"""For code that was written for kt-kernel's fine-tuning (kt_kernel.sft, 0.7.2): its names over a kt-expert-server.

KTMoEWrapper is one layer's experts, called without autograd; load_kt_model and wrap_moe_layers_with_kt_wrapper give a whole
model its experts; build_kt_device_map says where a model's modules go. What has no meaning here is refused by its name.
"""

from kt_expert_client.integrations.kt_kernel.loading import (
    build_kt_device_map,
    load_kt_model,
    wrap_moe_layers,
    wrap_moe_layers_with_kt_wrapper,
)
from kt_expert_client.integrations.kt_kernel.saving import save_fused_expert_lora
from kt_expert_client.integrations.kt_kernel.settings import KtSettings
from kt_expert_client.integrations.kt_kernel.wrapper import KTMoEWrapper

__all__ = [
    "KTMoEWrapper",
    "KtSettings",
    "build_kt_device_map",
    "load_kt_model",
    "save_fused_expert_lora",
    "wrap_moe_layers",
    "wrap_moe_layers_with_kt_wrapper",
]
