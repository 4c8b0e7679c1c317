"""Which kernel multiplies a layer, and why."""

from __future__ import annotations

import kt_expert_native as native

_ROUNDING_ISAS = ("avx512_vnni", "amx_int8")


def kernel_reason(engine: native.Engine, weight_format: str) -> str:
    """Why this kernel, and where it is not the whole story."""
    kernel, reason = engine.kernel(weight_format), engine.reason
    if engine.isa in _ROUNDING_ISAS and weight_format == "int8":
        reason += "; forwards round activations to eight bits"
    elif engine.isa in _ROUNDING_ISAS:
        reason += f"; {engine.isa} itself is for int8 weights"
    if engine.fp32_kernel != kernel:
        reason += f"; fp32 tokens run on {engine.fp32_kernel}"
    return reason
