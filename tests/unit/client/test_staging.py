"""What a request sends does not follow its caller's tensor."""

from __future__ import annotations

import pytest
import torch
from kt_expert_client.staging import Staging
from kt_expert_proto.dtypes import Dtype

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
def test_a_tensor_may_change_once_it_is_staged(device: str, dtype: Dtype) -> None:
    tensor = torch.ones(1 << 20, 4, device=device)
    host = Staging().to_host(tensor, dtype, borrow=False)
    tensor.zero_()
    host.view()
    assert bool((host.tensor == 1).all())


def test_a_borrowed_tensor_is_not_copied() -> None:
    tensor = torch.ones(4, 4)
    assert Staging().to_host(tensor, Dtype.FP32, borrow=True).tensor.data_ptr() == tensor.data_ptr()
