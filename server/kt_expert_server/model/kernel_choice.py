"""Which kernel multiplies a layer, and why."""

from __future__ import annotations

import kt_expert_native as native


def kernel_reason(engine: native.Engine, weight_format: str) -> str:
    """Why this kernel, and where it is not the whole story."""
    reason, fp32_kernel = engine.reason, engine.kernel(weight_format, "fp32")
    if engine.kernel("int8") != engine.kernel("bf16"):  # only ISAs that multiply in integers tell them apart
        rounds = weight_format == "int8"
        reason += "; forwards round activations to eight bits" if rounds else f"; {engine.isa} itself is for int8 weights"
    if fp32_kernel != engine.kernel(weight_format):
        reason += f"; fp32 tokens run on {fp32_kernel}"
    return reason
