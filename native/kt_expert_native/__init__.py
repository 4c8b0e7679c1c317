"""Native core of kt-expert: layer weights, LoRA tensors and the engine that computes on them.

Owns the binding's public names. Knows nothing of gRPC, torch or files: callers hand over numpy arrays, bf16 as uint16
bits. Errors::

    NativeError (RuntimeError)
    |- InvalidArgument    a wrong shape, value or name was handed over
    |- Unsupported        this CPU or kernel cannot do what was asked for
    |- Cancelled          a cancel token fired between two tiles
    `- DeadlineExceeded   a cancel token's deadline passed between two tiles
"""

from kt_expert_native._core import (
    FAST_PAYLOAD_BYTES,
    FAST_TOKENS,
    MAX_MEMORY_NODES,
    AdapterSpec,
    AdapterTensors,
    Cancelled,
    CancelToken,
    DeadlineExceeded,
    Engine,
    FastPath,
    Gate,
    InvalidArgument,
    LayerSpec,
    LayerStep,
    LayerWeights,
    NativeError,
    OptimizerState,
    OptimizerUpdate,
    Ticket,
    Unsupported,
    list_isas,
    list_memory_nodes,
    list_weight_formats,
    measure_loops,
)

__all__ = [
    "FAST_PAYLOAD_BYTES",
    "FAST_TOKENS",
    "MAX_MEMORY_NODES",
    "CancelToken",
    "Cancelled",
    "DeadlineExceeded",
    "Engine",
    "FastPath",
    "Gate",
    "InvalidArgument",
    "LayerSpec",
    "LayerStep",
    "LayerWeights",
    "AdapterSpec",
    "AdapterTensors",
    "NativeError",
    "OptimizerState",
    "OptimizerUpdate",
    "Ticket",
    "Unsupported",
    "list_isas",
    "list_memory_nodes",
    "list_weight_formats",
    "measure_loops",
]
