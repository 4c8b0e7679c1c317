"""Training all of the experts' weights: 20 steps of AdamW."""

from __future__ import annotations

from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from ecosystem.case import loss_of as loss
from support.coded import coded_checkpoint
from support.models import load_stock, save_checkpoint
from support.server import ServerProcess
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own


class Rounded(torch.nn.Module):
    """The bf16 form of weights; gradients pass as if nothing had been rounded."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + (values.to(torch.bfloat16).float() - values).detach()


def round_experts(model: torch.nn.Module) -> None:
    for module in [each for each in model.modules() if hasattr(each, "gate_up_proj")]:
        for weight in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(module, weight, Rounded())


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "fp8", "mxfp4"])
def test_as_in_process(name: str, tmp_path: Path) -> None:
    """Where experts compute with the bf16 form of their fp32 weights, as on the server. A quantised base's codes are where the
    weights begin."""
    served, plain = coded_checkpoint(name, tmp_path) if name in ("fp8", "mxfp4") else 2 * (save_checkpoint(name, tmp_path),)
    stock = load_stock(plain)
    with ServerProcess(served, tmp_path / "log") as server, kt.offload_experts(server.address):
        remote = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        begun = {key: value.detach().clone() for key, value in stock.named_parameters()}
        for key, value in remote.named_parameters():
            assert torch.equal(value.detach().cpu(), begun[key]), key
        losses: list[list[float]] = []
        for each in (stock, remote):
            optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
            losses.append([])
            for step in range(20):
                optimizer.zero_grad()
                value = loss(each)
                value.backward()
                optimizer.step()
                losses[-1].append(float(value.detach()))
                if each is stock and step == 0:  # the first one is with the weights as they are served
                    round_experts(stock)
        assert losses[1] == pytest.approx(losses[0], rel=5e-3)  # what is rounded grows with every step
        assert losses[1][:10] == pytest.approx(losses[0][:10], rel=1e-4)
        trained = {
            key.replace("parametrizations.", "").replace(".original", ""): each for key, each in stock.named_parameters()
        }
        for key, value in remote.named_parameters():
            if ".experts." in key:
                ours, theirs = value.detach().cpu() - begun[key], trained[key].detach() - begun[key]
                assert float((ours - theirs).norm() / theirs.norm()) < 0.1, key
