"""PEFT's layout of expert LoRA and the server's are the same numbers."""

from __future__ import annotations

import pytest
import torch
from kt_expert_client import peft_layout

E, R, IN, OUT = 3, 4, 5, 6


def peft_delta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The update PEFT computes (ParamWrapper.get_delta_weight), [E, out, in]."""
    return torch.einsum("o r e, e r i -> e o i", b.reshape(OUT, -1, E), a.reshape(E, -1, IN))


def test_round_trip_and_meaning() -> None:
    a, b = torch.randn(R * E, IN), torch.randn(OUT, R * E)
    ours_a, ours_b = peft_layout.a_from_peft(a, E), peft_layout.b_from_peft(b, E)
    assert ours_a.shape == (E, R, IN)
    assert ours_b.shape == (E, OUT, R)
    assert torch.allclose(ours_b @ ours_a, peft_delta(a, b), atol=1e-6)
    assert torch.equal(peft_layout.a_to_peft(ours_a), a)
    assert torch.equal(peft_layout.b_to_peft(ours_b), b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gate_and_up_split_and_join(interleaved: bool) -> None:
    both = torch.arange(E * OUT * R, dtype=torch.float32).reshape(E, OUT, R)
    gate, up = peft_layout.split_gate_up(both, interleaved=interleaved)
    assert torch.equal(gate[:, 1], both[:, 2 if interleaved else 1])
    assert torch.equal(up[:, 0], both[:, 1 if interleaved else OUT // 2])
    assert torch.equal(peft_layout.join_gate_up(gate, up, interleaved=interleaved), both)
