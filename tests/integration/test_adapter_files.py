"""Adapters as files: exported with names per expert, and read as PEFT, vLLM and SGLang read them."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kt_expert_server.cli.tool import main
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import CONFIGS, load_stock, random_tokens, save_checkpoint
from support.training import lora_config

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FAMILIES = [family for family in CONFIGS if family != "granitemoe"]  # its experts have names that PEFT's targets below miss
TOKENS = random_tokens(2, 9)
BOUND = 1e-5
PER_EXPERT = [family for family in FAMILIES if family not in ("gpt_oss", "qwen2_moe")]


def trained(model_directory: Path, out: Path, **changes: Any) -> torch.Tensor:
    """Writes an adapter of random values as stock PEFT does; its logits."""
    model = get_peft_model(load_stock(model_directory), lora_config(**changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(out)
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model.eval()(input_ids=TOKENS).logits
    return values


def tool(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


def verify(capsys: pytest.CaptureFixture[str], adapter: Path, model: Path, *more: object) -> dict[str, str]:
    """By reader, what is said; the exit status goes with it."""
    capsys.readouterr()
    status = tool("verify-adapter", adapter, "--model", model, *more)
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.split(": ", 1) for line in lines)
    assert status == int(any(sentence != "as trained" for sentence in found.values()))
    return found


@pytest.mark.parametrize("family", PER_EXPERT)
def test_an_exported_adapter_is_served_as_trained(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    model, fused, exported = save_checkpoint(family, tmp_path / "model"), tmp_path / "fused", tmp_path / "exported"
    expected = trained(model, fused)
    before = verify(capsys, fused, model)
    assert before["peft"] == "as trained"
    assert before["vllm"].startswith("refuses it: it reads names per expert")
    assert before["sglang"].startswith("refuses it")
    assert tool("export-adapter", fused, exported, "--model", model) == 0
    assert set(verify(capsys, exported, model, "--against", fused).values()) == {"as trained"}
    again = PeftModel.from_pretrained(load_stock(model), exported)
    assert (logits(again) - expected).abs().max() <= BOUND * expected.abs().max()


def test_gpt_oss_is_served_from_the_fused_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, fused = save_checkpoint("gpt_oss", tmp_path / "model"), tmp_path / "fused"
    trained(model, fused)
    found = verify(capsys, fused, model)
    assert (found["peft"], found["vllm"]) == ("as trained", "as trained")
    assert tool("export-adapter", fused, tmp_path / "out", "--model", model) == 2
    assert "served from PEFT's fused form" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {r".*\.down_proj": 2, r".*q_proj": 3}, "alpha_pattern": {r".*\.down_proj": 5}},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": []},
    ],
    ids=["rslora", "patterns", "gate_up alone", "down alone", "experts alone"],
)
def test_scales_and_ranks_are_folded(
    qwen3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any]
) -> None:
    expected = trained(qwen3_checkpoint, tmp_path / "fused", **changes)
    assert tool("export-adapter", tmp_path / "fused", tmp_path / "out", "--model", qwen3_checkpoint) == 0
    found = verify(capsys, tmp_path / "out", qwen3_checkpoint, "--against", tmp_path / "fused")
    assert set(found.values()) == {"as trained"}
    again = PeftModel.from_pretrained(load_stock(qwen3_checkpoint), tmp_path / "out")
    assert (logits(again) - expected).abs().max() <= BOUND * expected.abs().max()


def exchanged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return {
        next((key.replace(old, new) for old, new in swap.items() if f".{old}." in key), key): value
        for key, value in tensors.items()
    }


def under_another_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace(".mlp.experts.", ".block_sparse_moe.experts."): value for key, value in tensors.items()}


def without_the_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("base_model.model.") if "experts" in key else key: value for key, value in tensors.items()}


def exchanged_experts(key: str) -> str:
    return key.replace("experts.0.", "experts.X.").replace("experts.1.", "experts.0.").replace("X", "1")


def experts_in_another_order(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {exchanged_experts(key): value for key, value in tensors.items()}


def one_expert_short(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if ".layers.1.mlp.experts.5." not in key}


@pytest.mark.parametrize(
    ("fault", "vllm", "sglang"),
    [
        (exchanged, "gate of layer 0 differs", "gate of layer 0 differs"),
        (under_another_name, "drops 144 tensors without a word", "as trained"),
        (without_the_prefix, "drops 144 tensors without a word", "as trained"),
        (experts_in_another_order, "gate of layer 0 differs", "gate of layer 0 differs"),
        (one_expert_short, "refuses it: layer 1 lacks expert 5 down A", "gate of layer 1 differs"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_planted_faults_are_found(
    qwen3_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    vllm: str,
    sglang: str,
) -> None:
    trained(qwen3_checkpoint, tmp_path / "fused")
    tool("export-adapter", tmp_path / "fused", tmp_path / "out", "--model", qwen3_checkpoint)
    save_file(fault(load_file(tmp_path / "out" / TENSORS)), tmp_path / "out" / TENSORS)
    found = verify(capsys, tmp_path / "out", qwen3_checkpoint, "--against", tmp_path / "fused")
    assert found["vllm"].startswith(vllm)
    assert found["sglang"].startswith(sglang)


def test_rslora_per_expert_is_read_wrongly_by_peft(
    qwen3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As PEFT itself does: the reader stands for what happens and not for what was meant."""
    trained(qwen3_checkpoint, tmp_path / "fused")
    tool("export-adapter", tmp_path / "fused", tmp_path / "out", "--model", qwen3_checkpoint)
    path = tmp_path / "out" / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_rslora": True, "lora_alpha": math.sqrt(config["r"])}))
    found = verify(capsys, tmp_path / "out", qwen3_checkpoint, "--against", tmp_path / "fused")
    assert "gate of layer 0 differs by 2.9e-01" in found["peft"]
    assert found["vllm"] == "as trained"
    assert "differs" in found["sglang"]


def test_matrices_of_an_old_peft_are_in_each_others_place(
    qwen3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(qwen3_checkpoint, tmp_path / "fused")
    shutil.copytree(tmp_path / "fused", tmp_path / "old")
    tensors, experts = load_file(tmp_path / "old" / TENSORS), 8
    for key in [each for each in tensors if "experts" in each and "lora_A" in each]:
        other = key.replace("lora_A", "lora_B")
        a, b = tensors[key], tensors[other]
        by_expert = a.reshape(experts, -1, a.shape[1]), b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
        tensors[key] = by_expert[1].transpose(1, 2).reshape(-1, b.shape[0]).contiguous()
        tensors[other] = by_expert[0].transpose(1, 2).permute(1, 2, 0).reshape(a.shape[1], -1).contiguous()
    save_file(tensors, tmp_path / "old" / TENSORS)
    path = tmp_path / "old" / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_version": "0.18.1"}))
    assert verify(capsys, tmp_path / "old", qwen3_checkpoint, "--against", tmp_path / "fused")["peft"] == "as trained"


def test_kt_kernels_file_is_exported(qwen3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Split LoRA: gate and up have an A of their own."""
    folder = tmp_path / "kt"
    lora = kt_kernels_folder(qwen3_checkpoint, folder)
    assert tool("export-adapter", folder, tmp_path / "out", "--model", qwen3_checkpoint) == 0
    assert set(verify(capsys, tmp_path / "out", qwen3_checkpoint, "--against", folder).values()) == {"as trained"}
    merged, expected = load_stock(qwen3_checkpoint), PeftModel.from_pretrained(load_stock(qwen3_checkpoint), tmp_path / "out")
    with torch.no_grad():
        for layer in range(3):
            experts = merged.model.layers[layer].mlp.experts
            delta = {
                name: 2.0 * lora[f"layers.{layer}.experts.{name}_lora_b"] @ lora[f"layers.{layer}.experts.{name}_lora_a"]
                for name in ("gate", "up", "down")
            }
            experts.gate_up_proj += torch.cat((delta["gate"], delta["up"]), dim=1)
            experts.down_proj += delta["down"]
    assert (logits(merged) - logits(expected)).abs().max() <= BOUND * logits(expected).abs().max()


def kt_kernels_folder(model: Path, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A folder as kt-kernel writes it: attention's LoRA by PEFT, experts' in a file of its own, which is returned."""
    rank, experts, hidden, intermediate = 4, 8, 32, 24
    config = LoraConfig(**{"r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes)
    get_peft_model(load_stock(model), config).save_pretrained(out)
    generator = torch.Generator().manual_seed(4)
    sizes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    lora = {
        f"layers.{layer}.experts.{name}_lora_{side}": torch.randn(shape, generator=generator) * 0.1
        for layer in range(3)
        for name, (outputs, inputs) in sizes.items()
        for side, shape in (("a", (experts, rank, inputs)), ("b", (experts, outputs, rank)))
    }
    save_file(lora, out / "fused_expert_lora.safetensors")
    return lora


@pytest.mark.parametrize("rslora", [False, True])
def test_kt_kernels_folder_is_imported(
    qwen3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], *, rslora: bool
) -> None:
    """As PEFT's fused form, which stock PEFT loads with nothing missing or dropped, and its extra experts with it."""
    kt_kernels_folder(qwen3_checkpoint, tmp_path / "kt", use_rslora=rslora)
    extra = {
        f"base_model.model.model.layers.{layer}.mlp.lora_experts.0.le_{name}.weight": torch.ones(shape)
        for layer in range(3)
        for name, shape in (("gate", (5, 32)), ("up", (5, 32)), ("down", (32, 5)))
    }
    save_file(load_file(tmp_path / "kt" / TENSORS) | extra, tmp_path / "kt" / TENSORS)
    assert tool("import-adapter", tmp_path / "kt", tmp_path / "out", "--model", qwen3_checkpoint) == 0
    written, config = load_file(tmp_path / "out" / TENSORS), json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["modules_to_save"] == ["lora_experts"]
    assert extra.keys() <= written.keys()
    save_file({key: values for key, values in written.items() if key not in extra}, tmp_path / "out" / TENSORS)
    _change(tmp_path / "out", modules_to_save=None)
    assert verify(capsys, tmp_path / "out", qwen3_checkpoint, "--readers", "peft") == {"peft": "as trained"}
    save_file(
        {key: each for key, each in load_file(tmp_path / "kt" / TENSORS).items() if key not in extra}, tmp_path / "kt" / TENSORS
    )
    assert tool("export-adapter", tmp_path / "kt", tmp_path / "exported", "--model", qwen3_checkpoint) == 0
    expected = logits(PeftModel.from_pretrained(load_stock(qwen3_checkpoint), tmp_path / "exported"))
    model = get_peft_model(load_stock(qwen3_checkpoint), LoraConfig.from_pretrained(tmp_path / "out"))
    names = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
    assert names == load_file(tmp_path / "out" / TENSORS).keys()
    loaded = logits(PeftModel.from_pretrained(load_stock(qwen3_checkpoint), tmp_path / "out"))
    assert (loaded - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize("family", PER_EXPERT)
def test_names_per_expert_become_fused_again(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = save_checkpoint(family, tmp_path / "model")
    trained(checkpoint, tmp_path / "adapter")
    assert tool("export-adapter", tmp_path / "adapter", tmp_path / "out", "--model", checkpoint) == 0
    assert tool("import-adapter", tmp_path / "out", tmp_path / "again", "--model", checkpoint) == 0
    found = verify(capsys, tmp_path / "again", checkpoint, "--readers", "peft", "--against", tmp_path / "adapter")
    assert found == {"peft": "as trained"}
    loaded = PeftModel.from_pretrained(load_stock(checkpoint), tmp_path / "again")
    expected = logits(PeftModel.from_pretrained(load_stock(checkpoint), tmp_path / "adapter"))
    assert (logits(loaded) - expected).abs().max() <= BOUND * expected.abs().max()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda lora: {key: each for key, each in lora.items() if "layers.1." not in key}, r"experts in layers \[1\]"),
        (lambda lora: {key: each for key, each in lora.items() if "up_lora" not in key}, "expected all of gate, up"),
        (
            lambda lora: {key: each[..., :2] if "1.experts.down_lora_b" in key else each for key, each in lora.items()}
            | {"layers.1.experts.down_lora_a": lora["layers.1.experts.down_lora_a"][:, :2].contiguous()},
            "one for all",
        ),
    ],
    ids=["a layer", "a projection", "ranks"],
)  # fmt: skip
def test_what_the_fused_form_cannot_say_is_named(
    qwen3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Any], Any], sentence: str
) -> None:
    lora = kt_kernels_folder(qwen3_checkpoint, tmp_path / "kt")
    save_file({key: each.contiguous() for key, each in spoil(lora).items()}, tmp_path / "kt" / "fused_expert_lora.safetensors")
    assert tool("import-adapter", tmp_path / "kt", tmp_path / "out", "--model", qwen3_checkpoint) != 0
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / CONFIG).write_text("{"), "is no JSON"),
        (lambda folder: (folder / CONFIG).write_text('{"peft_type": "IA3"}'), "is not of a LoRA adapter"),
        (lambda folder: _change(folder, use_dora=True), "has use_dora"),
        (lambda folder: _change(folder, r=5), "has rank 4, the configuration says 5"),
        (lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"), "has neither adapter_model.safetensors"),
        (lambda folder: (folder / TENSORS).write_bytes(b"<html>"), "adapter_model.safetensors"),
        (lambda folder: _keep(folder, lambda key: "lora_B" not in key), "and not both matrices"),
        (lambda folder: _keep(folder, lambda key: "experts" not in key), "has no LoRA of experts"),
    ],
    ids=["no config", "no JSON", "IA3", "DoRA", "rank", "pickle", "HTML", "half", "no experts"],
)
def test_what_is_wrong_is_named(
    qwen3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], object], sentence: str
) -> None:
    trained(qwen3_checkpoint, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    assert tool("verify-adapter", tmp_path / "adapter", "--model", qwen3_checkpoint) == 2
    assert sentence in capsys.readouterr().err


def _change(folder: Path, **settings: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def _keep(folder: Path, wanted: Callable[[str], bool]) -> None:
    tensors = load_file(folder / TENSORS)
    save_file({key: value for key, value in tensors.items() if wanted(key)}, folder / TENSORS)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merged_model_is_the_one_that_was_trained(
    family: str, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the checkpoint's own names and dtypes: stock loads it."""
    model = save_checkpoint(family, tmp_path / "model")
    if dtype == torch.float32:
        load_stock(model).save_pretrained(tmp_path / "fp32")
        model = tmp_path / "fp32"
    expected = trained(model, tmp_path / "adapter")
    assert tool("merge", tmp_path / "adapter", tmp_path / "merged", "--model", model) == 0
    assert "tensors with the adapter in them, read back" in capsys.readouterr().out
    got = logits(load_stock(tmp_path / "merged"))
    if dtype == torch.float32:
        assert (got - expected).abs().max() <= BOUND * expected.abs().max()
        return
    reference = PeftModel.from_pretrained(load_stock(model), tmp_path / "adapter").merge_and_unload()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())
    # One of many values may lie so near to a tie that fp32's rounding decides.
    assert (got - logits(reference)).abs().max() <= 5e-3 * expected.abs().max()


def test_what_cannot_be_merged_is_named(
    qwen3_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    trained(qwen3_checkpoint, tmp_path / "adapter")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("")
    assert tool("merge", tmp_path / "adapter", tmp_path / "full", "--model", qwen3_checkpoint) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err
    tensors = load_file(tmp_path / "adapter" / TENSORS)
    renamed = {key.replace("layers.0.self_attn", "layers.7.self_attn"): value for key, value in tensors.items()}
    save_file(renamed, tmp_path / "adapter" / TENSORS)
    assert tool("merge", tmp_path / "adapter", tmp_path / "out", "--model", qwen3_checkpoint) == 2
    assert "changes model.layers.7.self_attn.q_proj.weight, which" in capsys.readouterr().err


def test_granitemoe_is_merged_and_not_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No engine has LoRA on its experts."""
    model = save_checkpoint("granitemoe", tmp_path / "model")
    expected = trained(model, tmp_path / "adapter", target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    refused = "it has no LoRA on granitemoe's experts"
    found = verify(capsys, tmp_path / "adapter", model)
    assert found == {"peft": "as trained", "vllm": f"refuses it: {refused}", "sglang": f"refuses it: {refused}"}
    assert tool("export-adapter", tmp_path / "adapter", tmp_path / "out", "--model", model) == 2
    assert "merge the adapter: kt-expert checkpoint merge" in capsys.readouterr().err
    assert tool("merge", tmp_path / "adapter", tmp_path / "merged", "--model", model) == 0
    got = logits(load_stock(tmp_path / "merged"))
    assert (got - expected).abs().max() <= 3e-2 * expected.abs().max()  # bf16 weights


def test_qwen2_moe_is_exported_for_engines_and_not_for_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_checkpoint("qwen2_moe", tmp_path / "model")
    trained(model, tmp_path / "adapter")
    assert tool("export-adapter", tmp_path / "adapter", tmp_path / "out", "--model", model) == 0
    found = verify(capsys, tmp_path / "out", model, "--against", tmp_path / "adapter")
    assert (found["vllm"], found["sglang"]) == ("as trained", "as trained")
    assert found["peft"].startswith("drops 144 tensors without a word")
