"""Checkpoints of fp8 and mxfp4 codes: kept as they are, or decoded, and refused where they hold no numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from kt_expert_server.errors import ModelError
from kt_expert_server.model.index import plan_model
from kt_expert_server.model.loader import load_model, resident_bytes
from kt_expert_server.model.placement import Placement
from safetensors.torch import save_file
from support.checkpoints import PREFIX, E, H, I, expert_weights, write

Tensors = dict[str, torch.Tensor]


def fp8_tensors(weights: Tensors, scale: float = 0.01) -> tuple[Tensors, Tensors]:
    """A DeepSeek-V3 layer's tensors, and the values they stand for."""
    tensors, values = {}, {}
    for name, matrices in weights.items():
        codes = (matrices / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        rows, columns = matrices.shape[1:]
        shape = (E, -(-rows // 128), -(-columns // 128))
        scales = scale * (1 + torch.arange(np.prod(shape), dtype=torch.float32).reshape(shape))
        wide = scales.repeat_interleave(128, 1)[:, :rows].repeat_interleave(128, 2)[:, :, :columns]
        values[name] = codes.float() * wide
        for expert in range(E):
            base = f"{PREFIX}mlp.experts.{expert}.{name}_proj.weight"
            tensors |= {base: codes[expert], f"{base}_scale_inv": scales[expert]}
    return tensors, values


@pytest.mark.parametrize("sizes", [(H, I), (200, 150)])
def test_fp8_is_kept_as_it_is(tmp_path: Path, sizes: tuple[int, int]) -> None:
    hidden, intermediate = sizes
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    weights = {name: torch.randn(E, *shape, generator=generator) for name, shape in shapes.items()}
    tensors, values = fp8_tensors(weights)
    plan = plan_model(write(tmp_path, tensors, model_type="deepseek_v3", hidden_size=hidden))
    progress: list[int] = []
    model = load_model(plan, "auto", progress.append)
    assert plan.form == model.layers[0].weights.weight_format == "fp8"
    assert sum(progress) == plan.bf16_bytes
    for name, expected in values.items():
        for expert in range(E):
            assert np.array_equal(model.layers[0].weights.dequantized(name, expert), expected[expert].numpy())
    converted = load_model(plan, "bf16", progress.append)
    for name, expected in values.items():
        assert np.array_equal(converted.layers[0].weights.dequantized(name, 1), expected[1].bfloat16().float().numpy())


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def mxfp4_tensors(hidden: int, intermediate: int) -> tuple[Tensors, Tensors]:
    """gpt-oss's tensors, gate and up in alternating rows, and the values of [gate_up, down]."""
    generator = torch.Generator().manual_seed(2)
    tensors, values = {}, {}
    for name, rows, columns in (("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate)):
        codes = torch.randint(0, 16, (E, rows, columns), generator=generator)
        scales = torch.randint(118, 130, (E, rows, columns // 32), generator=generator)
        values[name] = E2M1[codes] * torch.exp2(scales.float() - 127).repeat_interleave(32, 2)
        packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{PREFIX}mlp.experts.{name}_proj_blocks"] = packed.reshape(E, rows, columns // 32, 16)
        tensors[f"{PREFIX}mlp.experts.{name}_proj_scales"] = scales.to(torch.uint8)
        tensors[f"{PREFIX}mlp.experts.{name}_proj_bias"] = torch.randn(E, rows, generator=generator).bfloat16()
    return tensors, values


@pytest.mark.parametrize("weight_format", ["auto", "bf16"])
def test_mxfp4_is_kept_as_it_is(tmp_path: Path, weight_format: str) -> None:
    tensors, values = mxfp4_tensors(64, 32)
    plan = plan_model(write(tmp_path, tensors, model_type="gpt_oss", hidden_size=64))
    progress: list[int] = []
    model = load_model(plan, weight_format, progress.append)
    assert sum(progress) == plan.bf16_bytes
    weights = model.layers[0].weights
    assert plan.form == "mxfp4"
    assert weights.weight_format == ("mxfp4" if weight_format == "auto" else "bf16")
    bias = tensors[f"{PREFIX}mlp.experts.gate_up_proj_bias"]
    for expert in range(E):
        gate, up = values["gate_up"][expert, 0::2], values["gate_up"][expert, 1::2]
        for name, expected in (("gate", gate), ("up", up), ("down", values["down"][expert])):
            assert np.array_equal(weights.dequantized(name, expert), expected.numpy())
        assert np.array_equal(weights.bias("up", expert), bias[expert, 1::2].float().numpy())


@pytest.mark.parametrize("weight_format", ["auto", "bf16", "int8"])
@pytest.mark.parametrize("what", ["code", "scale", "signed NaN", "infinite scale", "overflow"])
def test_fp8_that_is_not_finite_is_named(tmp_path: Path, what: str, weight_format: str) -> None:
    tensors, _ = fp8_tensors(expert_weights())
    name = f"{PREFIX}mlp.experts.1.up_proj.weight"
    if what == "code":
        tensors[name] = torch.full((I, H), float("nan")).to(torch.float8_e4m3fn)
    else:
        bits = {"scale": 0x7FC00000, "signed NaN": 0x7FFFFFFF, "infinite scale": 0x7F800000, "overflow": 0x7F7FFFFF}[what]
        tensors[name + "_scale_inv"] = torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    plan = plan_model(write(tmp_path, tensors, model_type="deepseek_v3"))
    with pytest.raises(ModelError, match=r"experts\.1\.up_proj\.weight"):
        load_model(plan, weight_format, lambda _: None)


@pytest.mark.parametrize("weight_format", ["auto", "bf16", "int8"])
@pytest.mark.parametrize(("scale", "code"), [(255, 0), (254, 4), (253, 6)])
def test_mxfp4_that_is_not_finite_is_named(tmp_path: Path, scale: int, code: int, weight_format: str) -> None:
    tensors, _ = mxfp4_tensors(64, 32)
    tensors[f"{PREFIX}mlp.experts.down_proj_scales"][2, 5, 0] = scale
    tensors[f"{PREFIX}mlp.experts.down_proj_blocks"][2, 5, 0] = code
    plan = plan_model(write(tmp_path, tensors, model_type="gpt_oss", hidden_size=64))
    with pytest.raises(ModelError, match=r"down_proj_scales, expert 2"):
        load_model(plan, weight_format, lambda _: None)


@pytest.mark.parametrize("weight_format", ["auto", "bf16"])
def test_the_largest_mxfp4_values_are_weights(tmp_path: Path, weight_format: str) -> None:
    tensors, _ = mxfp4_tensors(64, 32)
    tensors[f"{PREFIX}mlp.experts.down_proj_scales"][2, 5, 0] = 254
    tensors[f"{PREFIX}mlp.experts.down_proj_blocks"][2, 5, 0] = 0xB3  # 1.5 and -1.5
    plan = plan_model(write(tmp_path, tensors, model_type="gpt_oss", hidden_size=64))
    row = load_model(plan, weight_format, lambda _: None).layers[0].weights.dequantized("down", 2)[5]
    assert row[:2].tolist() == [1.5 * 2.0**127, -1.5 * 2.0**127]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_may_be_of_any_float_type(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors, values = fp8_tensors(expert_weights(), scale=0.25)
    tensors = {name: value.to(dtype) if name.endswith("_scale_inv") else value for name, value in tensors.items()}
    model = load_model(plan_model(write(tmp_path, tensors, model_type="qwen3_moe")), "auto", lambda _: None)
    assert model.layers[0].weights.weight_format == "fp8"
    assert np.array_equal(model.layers[0].weights.dequantized("up", 1), values["up"][1].numpy())


def test_scales_may_lie_in_another_shard_and_layers_differ(tmp_path: Path) -> None:
    """As converters leave them that sort by size, or that keep the first layers in bf16."""
    tensors, values = fp8_tensors(expert_weights())
    plain = {name: value[1].bfloat16() for name, value in expert_weights().items()}
    second = {f"model.layers.1.mlp.experts.0.{name}_proj.weight": value for name, value in plain.items()}
    shards = {
        "codes.safetensors": {name: value for name, value in tensors.items() if not name.endswith("_scale_inv")} | second,
        "scales.safetensors": {name: value for name, value in tensors.items() if name.endswith("_scale_inv")},
    }
    write(tmp_path, {}, model_type="deepseek_v3", num_hidden_layers=2)
    (tmp_path / "model.safetensors").unlink()
    for name, content in shards.items():
        save_file({key: value.contiguous() for key, value in content.items()}, tmp_path / name)
    index = {"weight_map": {key: name for name, content in shards.items() for key in content}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = plan_model(tmp_path)
    model = load_model(plan, "auto", lambda _: None)
    assert plan.form == "bf16+fp8"
    assert [model.layers[layer].weights.weight_format for layer in (0, 1)] == ["fp8", "bf16"]
    assert np.array_equal(model.layers[0].weights.dequantized("down", 2), values["down"][2].numpy())
    assert np.array_equal(model.layers[1].weights.dequantized("down", 0), plain["down"].float().numpy())


@pytest.mark.parametrize("nodes", [2, 3])
def test_codes_cut_for_several_nodes_are_the_same(tmp_path: Path, nodes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"gate": (300, 140), "up": (300, 140), "down": (140, 300)}
    fp8, _ = fp8_tensors({name: torch.randn(E, *shape, generator=generator) for name, shape in shapes.items()})
    mxfp4, _ = mxfp4_tensors(64, 96)
    for form, tensors, config in (
        ("fp8", fp8, {"model_type": "deepseek_v3", "hidden_size": 140}),
        ("mxfp4", mxfp4, {"model_type": "gpt_oss", "hidden_size": 64}),
    ):
        plan = plan_model(write(tmp_path / form, tensors, **config))
        whole, cut = (load_model(plan, "auto", lambda _: None, Placement(count)) for count in (1, nodes))
        assert cut.layers[0].weights.nbytes == resident_bytes(plan, "auto", nodes)
        for name in shapes:
            held = [model.layers[0].weights.dequantized(name, 2) for model in (whole, cut)]
            assert np.array_equal(*held)


def test_codes_of_another_shape_or_type_are_named(tmp_path: Path) -> None:
    tensors, _ = fp8_tensors(expert_weights())
    name = f"{PREFIX}mlp.experts.1.up_proj.weight"
    bad = {
        "shape": ({name + "_scale_inv": torch.ones(2, 1)}, r"up_proj\.weight_scale_inv has shape \(2, 1\), expected \(1, 1\)"),
        "dtype": ({name: torch.zeros(I, H).bfloat16()}, "has dtype BF16; supported here: F8_E4M3"),
        "type of scales": ({name + "_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, "has dtype I32; supported here: BF16"),
    }
    for case, (changed, sentence) in bad.items():
        directory = write(tmp_path / case, tensors | changed, model_type="deepseek_v3")
        with pytest.raises(ModelError, match=sentence):
            plan_model(directory)
    del tensors[name + "_scale_inv"]
    with pytest.raises(ModelError, match=r"up_proj\.weight_scale_inv is missing"):
        plan_model(write(tmp_path / "missing", tensors, model_type="deepseek_v3"))
