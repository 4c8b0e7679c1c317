"""Training in bf16 differs from stock by rounding alone: stock's own ways to compute experts are as far apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden.reference import relative_error
from support.models import random_tokens
from support.server import ServerProcess

from ecosystem.case import Side

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
TOKENS = random_tokens(4, 32)
AS_FAR = 1.25  # errors of one rounding are as large as those of another, but not the same


def logits(side: Side, *, autocast: bool, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every expert is chosen: where two of them are nearly tied for the last place, rounding decides between them, and the
    token's output changes by far more than was rounded."""
    kwargs = {} if side.address else {"experts_implementation": implementation}
    model = side.base(dtype=dtype, num_experts_per_tok=8, **kwargs)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        values: torch.Tensor = model(input_ids=TOKENS).logits
    return values.float()


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 model", "autocast"])
def test_bf16_is_rounding_alone(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path, autocast: bool) -> None:
    stock, remote = Side(qwen3_checkpoint, tmp_path, None), Side(qwen3_checkpoint, tmp_path, server.address)
    dtype = torch.float32 if autocast else torch.bfloat16
    exact = logits(stock, autocast=False)
    eager, grouped = (logits(stock, autocast=autocast, implementation=name, dtype=dtype) for name in ("eager", "grouped_mm"))
    ours = logits(remote, autocast=autocast, dtype=dtype)
    assert relative_error(ours, exact) < AS_FAR * relative_error(eager, exact)
    assert relative_error(ours, eager) < AS_FAR * relative_error(grouped, eager)
