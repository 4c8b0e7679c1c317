"""Every layout of a checkpoint ends as the same resident weights; sizes are known before anything is read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.reference import bf16_bits
from kt_expert_server.errors import ModelError
from kt_expert_server.model.bf16 import round_to_bf16
from kt_expert_server.model.index import plan_model
from kt_expert_server.model.loader import BaseModel, load_model, resident_bytes
from kt_expert_server.model.memory_plan import format_bytes, plan_memory
from kt_expert_server.model.safetensors_file import SafetensorsFile
from support.checkpoints import PREFIX, E, H, I, expert_weights, per_expert, write


def load(directory: Path) -> BaseModel:
    loaded: list[int] = []
    plan = plan_model(directory)
    model = load_model(plan, "bf16", loaded.append)
    assert sum(loaded) == plan.bf16_bytes
    return model


def assert_holds(model: BaseModel, weights: dict[str, torch.Tensor]) -> None:
    for name, values in weights.items():
        for expert in range(E):
            held = model.layers[0].weights.dequantized(name, expert)
            assert np.array_equal(bf16_bits(torch.from_numpy(held)), bf16_bits(values[expert])), (name, expert)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_separate_experts(tmp_path: Path, dtype: torch.dtype) -> None:
    weights = {name: value.to(dtype) for name, value in expert_weights().items()}
    tensors = {
        f"{PREFIX}mlp.experts.{expert}.{name}_proj.weight": values[expert]
        for name, values in weights.items()
        for expert in range(E)
    }
    assert_holds(load(write(tmp_path, tensors, model_type="qwen3_moe")), {n: v.float() for n, v in weights.items()})


def test_fused_concatenated(tmp_path: Path) -> None:
    weights = expert_weights()
    tensors = {
        f"{PREFIX}mlp.experts.gate_up_proj": torch.cat((weights["gate"], weights["up"]), 1).bfloat16(),
        f"{PREFIX}mlp.experts.down_proj": weights["down"].bfloat16(),
    }
    assert_holds(load(write(tmp_path, tensors, model_type="qwen3_moe")), weights)


def test_granite_names(tmp_path: Path) -> None:
    weights = expert_weights()
    tensors = {
        f"{PREFIX}block_sparse_moe.input_linear.weight": torch.cat((weights["gate"], weights["up"]), 1).bfloat16(),
        f"{PREFIX}block_sparse_moe.output_linear.weight": weights["down"].bfloat16(),
    }
    assert_holds(load(write(tmp_path, tensors, model_type="granitemoe")), weights)


def test_gpt_oss_interleaved_transposed_with_biases(tmp_path: Path) -> None:
    weights = expert_weights()
    gate_up = torch.stack((weights["gate"], weights["up"]), 2).flatten(1, 2).transpose(1, 2)
    generator = torch.Generator().manual_seed(1)
    bias = {"gate": torch.randn(E, I, generator=generator), "up": torch.randn(E, I, generator=generator)}
    down_bias = torch.randn(E, H, generator=generator)
    tensors = {
        f"{PREFIX}mlp.experts.gate_up_proj": gate_up.bfloat16(),
        f"{PREFIX}mlp.experts.gate_up_proj_bias": torch.stack((bias["gate"], bias["up"]), 2).flatten(1, 2),
        f"{PREFIX}mlp.experts.down_proj": weights["down"].transpose(1, 2).bfloat16(),
        f"{PREFIX}mlp.experts.down_proj_bias": down_bias,
    }
    model = load(write(tmp_path, tensors, model_type="gpt_oss", swiglu_limit=7.0))
    assert_holds(model, weights)
    layer = model.layers[0]
    for expert in range(E):
        for name in ("gate", "up"):
            assert np.array_equal(layer.weights.bias(name, expert), bias[name][expert].numpy())
        assert np.array_equal(layer.weights.bias("down", expert), down_bias[expert].numpy())
    assert (layer.plan.activation.kind, layer.plan.activation.limit) == ("gpt_oss", 7.0)
    assert layer.weights.nbytes == resident_bytes(model.plan, "bf16")


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    tensors = {}
    for layer in (0, 1):
        for name, values in expert_weights().items():
            tensors |= {f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight": values[e].bfloat16() for e in range(E)}
    plan = plan_model(write(tmp_path, tensors, model_type="deepseek_v3", num_hidden_layers=1))
    assert [layer.layer for layer in plan.layers] == [0]


@pytest.mark.parametrize(("name", "kind"), [("swish", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh")])
def test_activations_are_known_by_transformers_names(tmp_path: Path, name: str, kind: str) -> None:
    tensors = per_expert(expert_weights())
    plan = plan_model(write(tmp_path, tensors, model_type="qwen3_moe", hidden_act=name))
    assert plan.layers[0].activation.kind == kind
    assert load_model(plan, "bf16", lambda _: None).layers[0].weights.nbytes > 0  # the engine knows the name too


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "qwen3_moe", "hidden_act": "gelu"}, "hidden_act = 'gelu', expected one of silu, swish, gelu"),
        ({"model_type": "qwen3_moe", "hidden_act": ["silu"]}, "expected one of silu"),
        ({"model_type": "qwen3_moe", "hidden_size": 99}, "has hidden size 10, config.json says 99"),
        ({"model_type": "qwen3_moe", "num_experts_per_tok": 0}, "expected a positive number"),
        ({"model_type": None}, "model_type None is not a supported"),
    ],
)
def test_configs_the_engine_cannot_serve(tmp_path: Path, config: dict[str, object], text: str) -> None:
    tensors = per_expert(expert_weights())
    with pytest.raises(ModelError, match=text):
        plan_model(write(tmp_path, tensors, **config))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({f"{PREFIX}mlp.experts.00.up_proj.weight": torch.zeros(I, H)}, r"1 tensors of no expert, the first is experts\.00"),
        ({f"{PREFIX}mlp.experts.{e}.{n}_proj.weight": torch.zeros(0, H) if n != "down" else torch.zeros(H, 0)
          for e in range(E) for n in ("gate", "up", "down")}, "experts of 10 x 0, expected at least 1"),
    ],
)  # fmt: skip
def test_tensors_that_make_no_layer_are_named(tmp_path: Path, changes: dict[str, torch.Tensor], text: str) -> None:
    tensors = per_expert(expert_weights())
    with pytest.raises(ModelError, match=text):
        plan_model(write(tmp_path, tensors | changes, model_type="qwen3_moe"))


@pytest.mark.parametrize("fused", [True, False])
def test_a_value_no_quantised_format_can_hold_names_its_tensor(tmp_path: Path, fused: bool) -> None:
    weights = expert_weights()
    weights["down"][2, 1, 1] = torch.nan
    if fused:
        tensors = {
            f"{PREFIX}mlp.experts.gate_up_proj": torch.cat((weights["gate"], weights["up"]), 1).bfloat16(),
            f"{PREFIX}mlp.experts.down_proj": weights["down"].bfloat16(),
        }
    else:
        tensors = per_expert(weights)
    plan = plan_model(write(tmp_path, tensors, model_type="qwen3_moe"))
    with pytest.raises(ModelError, match=rf"{re.escape(PREFIX)}mlp\.experts\.(2\.)?down_proj"):
        load_model(plan, "int8", lambda _: None)


def test_an_unsupported_dtype_is_named(tmp_path: Path) -> None:
    tensors = per_expert(expert_weights(), torch.float8_e4m3fn)
    with pytest.raises(ModelError, match=r"has dtype F8_E4M3; supported here: BF16, F16, F32"):
        plan_model(write(tmp_path, tensors, model_type="qwen3_moe"))


def test_an_index_cannot_point_outside_its_directory(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.zeros(1)}, model_type="qwen3_moe")
    index = {"weight_map": {"x": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="names files outside the model directory"):
        plan_model(tmp_path)


HEADERS = {
    "too long": (b"\xff" * 8, "is not a safetensors file"),
    "short": (b"\x01", "is not a safetensors file"),
    "not JSON": ((5).to_bytes(8, "little") + b"hello", "damaged safetensors header"),
    "not an object": ((2).to_bytes(8, "little") + b"[]", "damaged safetensors header"),
    "no offsets": ((24).to_bytes(8, "little") + b'{"a":{"dtype":"F32"}}   ', "damaged safetensors header"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_damaged_headers_are_refused(tmp_path: Path, what: str) -> None:
    raw, text = HEADERS[what]
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match=text):
        SafetensorsFile(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}, "lies outside the file"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "has 8 bytes, its shape says 12"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "lies outside the file"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}, "lies outside the file"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, entry: dict[str, object], text: str) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=text):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_rounding_equals_torchs() -> None:
    values = torch.cat((torch.randn(1000), torch.tensor([0.0, -0.0, 3.4e38, float("inf"), 1e-40, 1.00390625])))
    assert np.array_equal(round_to_bf16(values.numpy()), bf16_bits(values))
    assert round_to_bf16(np.array([np.nan], np.float32))[0] == 0x7FC0


def test_the_plan_is_checked_before_loading(tmp_path: Path) -> None:
    tensors = per_expert(expert_weights())
    model = plan_model(write(tmp_path, tensors, model_type="qwen3_moe"))
    assert model.bf16_bytes == 3 * E * H * I * 2
    with pytest.raises(ModelError, match=r"and the limit is 1\.0 MiB"):
        plan_memory(model, "bf16", 1024**2).check()
    plan_memory(model, "bf16", 1024**3).check()


def test_sizes_read_well() -> None:
    assert [format_bytes(size) for size in (0, 1023, 1024, 5 * 1024**3, 3 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]
