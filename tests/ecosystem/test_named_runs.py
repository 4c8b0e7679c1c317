"""A script that is started a second time under the same KT_EXPERT_RUN."""

from __future__ import annotations

from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from peft import get_peft_model
from support.models import random_tokens
from support.server import ServerProcess
from support.training import SEED, logits, lora_config
from transformers import AutoModelForCausalLM

from ecosystem.table import Row

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own
TOKENS = random_tokens(1, 8)


def started(checkpoint: Path, address: str, options: kt.RunOptions | None = None, *, full: bool = False) -> torch.nn.Module:
    """As the script does it: seeds, the model, the adapter."""
    torch.manual_seed(SEED)
    with kt.offload_experts(address, options):
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model if full else get_peft_model(model, lora_config())


def train(model: torch.nn.Module) -> torch.Tensor:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return experts(model)


def experts(model: torch.nn.Module) -> torch.Tensor:
    """The values of one parameter that is trained."""
    trained = (p for name, p in model.named_parameters() if p.requires_grad and ".experts." in name and "lora_A" not in name)
    return next(trained).detach().cpu().clone()


def end(server: ServerProcess, model: torch.nn.Module) -> None:
    """As the script ends; the run stays, since it has a name."""
    from kt_expert_client.integrations.transformers import OFFLOADER

    del model
    OFFLOADER.close()


@pytest.mark.parametrize("full", [False, True], ids=["LoRA", "weights"])
def test_what_was_trained_is_never_overwritten_unasked(
    server: ServerProcess, qwen3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, table: list[Row], full: bool
) -> None:
    monkeypatch.setenv("KT_EXPERT_RUN", f"named-{full}")
    model = started(qwen3_checkpoint, server.address, full=full)
    trained = train(model)
    end(server, model)
    with pytest.raises(kt.WrongPhase, match=r"of an earlier start on the server, after 2 steps.*existing='keep'") as refusal:
        train(started(qwen3_checkpoint, server.address, full=full))
    end(server, model)
    kept = started(qwen3_checkpoint, server.address, kt.RunOptions(existing="keep"), full=full)
    logits(kept, TOKENS)  # joins the run
    assert torch.equal(experts(kept), trained)
    end(server, kept)
    again = started(qwen3_checkpoint, server.address, kt.RunOptions(existing="replace"), full=full)
    assert torch.allclose(train(again), trained, atol=1e-6)
    assert getattr(again, "kt_expert_offload").run.steps_taken == 2  # noqa: B009
    end(server, again)
    kt.connect(server.address).close_run(f"named-{full}")
    what = "weights" if full else "LoRA"
    table.append(Row(f"T32: a named run started twice, {what}", "refused", None, None, None, str(refusal.value)))


def test_values_of_the_trainer_are_not_kept_on_the_server(
    server: ServerProcess, qwen3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_EXPERT_RUN", "named-here")
    first = started(qwen3_checkpoint, server.address, kt.RunOptions(lora_location="trainer"))
    train(first)
    end(server, first)
    with pytest.raises(kt.InvalidRequest, match="load them from the file they were saved to"):
        train(started(qwen3_checkpoint, server.address, kt.RunOptions(lora_location="trainer", existing="keep")))
    end(server, first)
    kt.connect(server.address).close_run("named-here")
