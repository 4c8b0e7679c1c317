"""Adapters merged into checkpoints in fp8 and mxfp4: written as plain numbers, or rounded to codes again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kt_expert_server.cli.tool import main
from kt_expert_server.model.index import plan_model
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.coded import Tensors, coded_checkpoint, decoded, in_one_shard
from support.models import load_stock, random_tokens
from support.training import lora_config

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
FORMS = ["fp8", "fp8, scales in bf16", "fp8, powers of two", "mxfp4"]
ROUNDING = {"fp8": 0.05, "mxfp4": 0.2}  # of the weights' norm; a code's step is an eighth of its size, or half


def adapter(plain: Path, out: Path, scale: float) -> PeftModel:
    model = get_peft_model(load_stock(plain), lora_config())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    model.save_pretrained(out)
    return model


def merge(folder: Path, *more: str) -> int:
    return main(["checkpoint", "merge", str(folder / "adapter"), str(folder / "out"), "--model", str(folder / "coded"), *more])


def apart(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected).norm() / expected.norm().clamp(min=1e-12))


@pytest.mark.parametrize("form", FORMS)
def test_dequantized(form: str, tmp_path: Path) -> None:
    """The whole model in bf16, as stock loads it."""
    _, plain = coded_checkpoint(form, tmp_path)
    expected = adapter(plain, tmp_path / "adapter", 0.1).merge_and_unload()
    assert merge(tmp_path, "--quantized", "dequantize") == 0
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert plan_model(tmp_path / "out").form == "bf16"
    got = load_stock(tmp_path / "out")
    theirs = dict(expected.named_parameters())
    for name, parameter in got.named_parameters():
        assert apart(parameter, theirs[name]) <= 2**-8, name  # rounding to bf16
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        for parameter in theirs.values():  # rounding may move a token to another expert: the same on both sides
            parameter.copy_(parameter.to(torch.bfloat16).float())
        ours, stock = got(input_ids=tokens).logits, expected(input_ids=tokens).logits
    assert (ours - stock).abs().max() <= 5e-3 * stock.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_requantized(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was changed lies near what it should be, the rest is as it was, and how much was rounded is said."""
    coded, plain = coded_checkpoint(form, tmp_path)
    expected = adapter(plain, tmp_path / "adapter", 0.1).merge_and_unload()
    assert merge(tmp_path, "--quantized", "requantize") == 0
    assert "rounding to codes changed the weights by" in capsys.readouterr().out
    assert plan_model(tmp_path / "out").form == plan_model(coded).form
    expected.save_pretrained(tmp_path / "expected")  # separates fused experts
    merged: Tensors = {}
    for file in (tmp_path / "expected").glob("*.safetensors"):
        merged |= load_file(file)
    before, after = decoded(coded), decoded(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name, values in before.items() if not torch.equal(values, after[name])}
    assert {name.rsplit(".layers.", 1)[1].split(".", 1)[0] for name in changed} == {"0", "1", "2"}
    assert any("q_proj" in name for name in changed)
    assert any("experts" in name for name in changed)
    for name, values in after.items():
        bound = ROUNDING[form.split(",", maxsplit=1)[0]] if name in changed else 1e-6
        assert apart(values, merged[name]) <= bound, name


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_zeros_changes_no_byte(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coded, plain = coded_checkpoint(form, tmp_path)
    adapter(plain, tmp_path / "adapter", 0.0)
    assert merge(tmp_path, "--quantized", "requantize") == 0
    assert "changed the weights by 0.00% of their norm, the adapter by 0.00%" in capsys.readouterr().out
    for file in coded.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "out" / file.name)
        assert before.keys() == after.keys()
        assert all(torch.equal(values.view(torch.uint8), after[name].view(torch.uint8)) for name, values in before.items())


def test_an_index_that_names_one_file(tmp_path: Path) -> None:
    coded, plain = coded_checkpoint("fp8", tmp_path)
    in_one_shard(coded)
    adapter(plain, tmp_path / "adapter", 0.1)
    assert merge(tmp_path, "--quantized", "dequantize") == 0
    assert plan_model(tmp_path / "out").form == "bf16"
    assert load_stock(tmp_path / "out") is not None


def test_scales_stay_powers_of_two(tmp_path: Path) -> None:
    _, plain = coded_checkpoint("fp8, powers of two", tmp_path)
    adapter(plain, tmp_path / "adapter", 0.3)
    assert merge(tmp_path, "--quantized", "requantize") == 0
    for file in (tmp_path / "out").glob("*.safetensors"):
        for name, values in load_file(file).items():
            assert not name.endswith("_scale_inv") or torch.equal(values.log2(), values.log2().round()), name


def _with_nan(folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, path)


def _with_another_size(folder: Path) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    tensors[name] = torch.zeros(4, 5)
    save_file(tensors, path)


def _with_int8_attention(folder: Path) -> None:
    for file in (folder / "coded").glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if "q_proj" in name]:
            if name.endswith("_scale_inv"):
                del tensors[name]
            else:
                tensors[name] = tensors[name].view(torch.int8)
        save_file(tensors, file, {"format": "pt"})
    path = folder / "coded" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if "q_proj.weight_scale" not in name}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("choice", ["requantize", "dequantize"])
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_with_nan, "has values that are not finite"),
        (_with_another_size, "whose matrices are [32, 32]"),
        (_with_int8_attention, "is I8, which is not merged into"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    spoil: Callable[[Path], None], sentence: str, choice: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain = coded_checkpoint("fp8", tmp_path)
    adapter(plain, tmp_path / "adapter", 0.1)
    spoil(tmp_path)
    assert merge(tmp_path, "--quantized", choice) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "holds tensors as fp8; say dequantize, to write all of it in bf16, or requantize"),
        (("--quantized", "dequantize"), "is F8_E4M3 and has no"),
    ],
)
def test_what_cannot_be_merged_is_named(
    options: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coded, plain = coded_checkpoint("fp8", tmp_path)
    adapter(plain, tmp_path / "adapter", 0.1)
    if options:
        _without_a_scale(coded)
    assert merge(tmp_path, *options) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _without_a_scale(coded: Path) -> None:
    index: dict[str, Any] = json.loads((coded / "model.safetensors.index.json").read_text())
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    file = coded / index["weight_map"].pop(name)
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_choice_for_a_model_that_is_not_quantised_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plain = coded_checkpoint("fp8", tmp_path)
    adapter(plain, tmp_path / "adapter", 0.1)
    shutil.rmtree(tmp_path / "coded")
    plain.rename(tmp_path / "coded")
    assert merge(tmp_path, "--quantized", "requantize") == 2
    assert "is not quantised; there is nothing to requantize" in capsys.readouterr().err
