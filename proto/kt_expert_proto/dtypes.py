"""Element types on the wire: the one table of their names, numbers and sizes."""

from __future__ import annotations

import enum


class Dtype(enum.IntEnum):
    """As the header's byte. The name in lower case is the name users and torch know: bf16 is torch.bfloat16."""

    NONE = 0
    BF16 = 1
    FP32 = 2
    INT32 = 3


ITEM_BYTES = {Dtype.NONE: 0, Dtype.BF16: 2, Dtype.FP32: 4, Dtype.INT32: 4}
# numpy has no bfloat16; its bits travel as uint16.
NUMPY_NAMES = {Dtype.BF16: "uint16", Dtype.FP32: "float32", Dtype.INT32: "int32"}
TORCH_NAMES = {Dtype.BF16: "bfloat16", Dtype.FP32: "float32", Dtype.INT32: "int32"}
# What hidden states and their gradients may travel as, by the name a run is opened with. The numbers are WireDtype's too.
TOKEN_DTYPES = {"bf16": Dtype.BF16, "fp32": Dtype.FP32}
