"""Which kernel multiplies a layer, and why."""

from __future__ import annotations

import kt_expert_native as native

_ROUNDING_ISAS = ("avx512_vnni", "amx_int8")


def kernel_reason(engine: native.Engine, weight_format: str) -> str:
    """Why this kernel, and where it is not the whole story."""
    reason, fp32_kernel = engine.reason, engine.kernel(weight_format, "fp32")
    if engine.isa in _ROUNDING_ISAS and weight_format == "int8":
        reason += "; forwards round activations to eight bits"
    elif engine.isa in _ROUNDING_ISAS:
        reason += f"; {engine.isa} itself is for int8 weights"
    if fp32_kernel != engine.kernel(weight_format):
        reason += f"; fp32 tokens run on {fp32_kernel}"
    return reason
