"""Extra experts beside those on a server: what is refused, and when they are computed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client.integrations.lora_experts import LoraExpert
from kt_expert_client.run import ForwardHandle, Run
from peft import PeftModel, get_peft_model
from support.models import random_tokens
from support.server import ServerProcess
from support.training import lora_config
from support.waiting import wait_until
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
OPTIONS = kt.RunOptions(lora_experts=2, lora_expert_size=24)


def _load(server: ServerProcess, folder: Path, options: kt.RunOptions | None = None) -> Any:
    with kt.offload_experts(server.address, options):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def adapter(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> Path:
    """A saved adapter with extra experts."""
    model = get_peft_model(_load(server, qwen3_checkpoint, OPTIONS), lora_config(modules_to_save=["lora_experts"]))
    for module in model.modules():
        if isinstance(module, LoraExpert):
            torch.nn.init.normal_(module.le_down.weight)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def _forget_modules_to_save(folder: Path) -> None:
    """kt-kernel's configuration does not name them."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))


def test_a_model_without_them_does_not_drop_them(server: ServerProcess, qwen3_checkpoint: Path, adapter: Path) -> None:
    with pytest.raises(kt.UnsupportedModel, match=r"this model has none; load the model with RunOptions\(lora_experts=N"):
        PeftModel.from_pretrained(_load(server, qwen3_checkpoint), str(adapter))


def test_a_configuration_that_does_not_name_them_does_not_drop_them(
    server: ServerProcess, qwen3_checkpoint: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT loads them as the base's own, and does not train them."""
    expected = PeftModel.from_pretrained(_load(server, qwen3_checkpoint, OPTIONS), str(adapter))
    _forget_modules_to_save(adapter)
    model = _load(server, qwen3_checkpoint, OPTIONS)
    loaded = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    _equal(loaded, expected)
    assert "do not train" not in caplog.text
    loaded.train()(input_ids=random_tokens(1, 4))
    assert 'extra experts of this model do not train; with PEFT, add "lora_experts"' in caplog.text


def test_a_models_own_state_is_loaded(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model, other = (_load(server, qwen3_checkpoint, OPTIONS) for _ in range(2))
    torch.nn.init.normal_(model.model.layers[0].mlp.lora_experts.get_parameter("1.le_down.weight"))
    other.load_state_dict(model.state_dict())
    _equal(other, model)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"number": 0}, "0 extra experts of size 1024: expected 1"),
        ({"intermediate_size": 0}, "2 extra experts of size 0: expected 1"),
        ({"layers": [0, 9]}, r"layers \[9\] have no experts on a server; those that have: \[0, 1, 2\]"),
    ],
)
def test_what_cannot_be_is_refused(server: ServerProcess, qwen3_checkpoint: Path, settings: dict[str, Any], cause: str) -> None:
    model = _load(server, qwen3_checkpoint)
    with pytest.raises(kt.InvalidRequest, match=cause):
        kt.add_lora_experts(model, **settings)
    assert not any(isinstance(module, LoraExpert) for module in model.modules())


def test_they_are_not_added_twice_or_late(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = _load(server, qwen3_checkpoint)
    assert len(kt.add_lora_experts(model, layers=[1])) == 1
    with pytest.raises(kt.InvalidRequest, match="has extra experts already"):
        kt.add_lora_experts(model)
    adapted = get_peft_model(_load(server, qwen3_checkpoint), lora_config())
    with pytest.raises(kt.InvalidRequest, match="before PEFT wraps the model"):
        kt.add_lora_experts(adapted)


def test_they_are_computed_while_the_server_computes(
    server: ServerProcess, qwen3_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _load(server, qwen3_checkpoint, OPTIONS)
    seen: list[str] = []
    for owner, name in ((Run, "submit_forward"), (LoraExpert, "forward"), (ForwardHandle, "result")):
        monkeypatch.setattr(owner, name, _told(seen, name, getattr(owner, name)))
    model(input_ids=random_tokens(1, 4))
    assert seen == ["submit_forward", "forward", "forward", "result"] * model.config.num_hidden_layers


def _told(seen: list[str], name: str, original: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return original(*args, **kwargs)

    return call


def test_an_error_in_them_leaves_nothing_on_the_server(
    qwen3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a server of its own: graphs of other tests may wait for the garbage collector, and their tickets with them."""

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("no memory for them")

    with ServerProcess(qwen3_checkpoint, tmp_path / "log") as server:
        model = _load(server, qwen3_checkpoint, OPTIONS)
        with monkeypatch.context() as broken:
            broken.setattr(LoraExpert, "forward", fail)
            with pytest.raises(RuntimeError, match="no memory for them"):
                model(input_ids=random_tokens(1, 4))
        with torch.no_grad():  # its forwards come after the one that failed here
            assert model(input_ids=random_tokens(1, 4)).logits.isfinite().all()
        wait_until(lambda: server.metric("kt_expert_tickets") == 0, 10.0)


def test_a_copy_has_its_own(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = _load(server, qwen3_checkpoint, OPTIONS)
    before = model(input_ids=random_tokens(1, 4)).logits
    copied = copy.deepcopy(model)
    torch.nn.init.normal_(copied.model.layers[0].mlp.lora_experts.get_parameter("0.le_down.weight"))
    assert torch.equal(model(input_ids=random_tokens(1, 4)).logits, before)
    assert not torch.equal(copied(input_ids=random_tokens(1, 4)).logits, before)


def test_a_compiled_model_has_them(server: ServerProcess, qwen3_checkpoint: Path) -> None:
    model = _load(server, qwen3_checkpoint, OPTIONS)
    torch.nn.init.normal_(model.model.layers[0].mlp.lora_experts.get_parameter("0.le_down.weight"))
    expected = model(input_ids=random_tokens(1, 4)).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(input_ids=random_tokens(1, 4)).logits, expected, atol=1e-5, rtol=0)


def _equal(left: Any, right: Any) -> None:
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=random_tokens(1, 4)).logits for model in (left, right)))
