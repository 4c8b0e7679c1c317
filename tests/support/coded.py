"""Checkpoints in fp8 and mxfp4, made of a model's bf16 checkpoint, and the same values as plain numbers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

from support.models import CONFIGS, save_checkpoint

Tensors = dict[str, torch.Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
FP8_BLOCK, MXFP4_GROUP = 128, 32


def coded_checkpoint(form: str, folder: Path) -> tuple[Path, Path]:
    """The checkpoint, and one with the same values in fp32. `form` is fp8, fp8 with other words, or mxfp4."""
    if form == "mxfp4":
        config = CONFIGS["gpt_oss"].to_dict() | {"hidden_size": 64, "intermediate_size": 32}
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(GptOssConfig.from_dict(config), dtype=torch.float32)
        model.to(torch.bfloat16).save_pretrained(folder / "bf16")
        to_mxfp4(folder / "bf16", folder / "coded")
    else:
        save_checkpoint("qwen3_moe", folder / "bf16")
        scale_dtype = torch.bfloat16 if "bf16" in form else torch.float32
        to_fp8(folder / "bf16", folder / "coded", scale_dtype=scale_dtype, are_powers="powers" in form)
    to_plain(folder / "coded", folder / "plain")
    return folder / "coded", folder / "plain"


def decode_fp8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    rows, columns = codes.shape
    wide = scales.float().repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
    return codes.float() * wide


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[E, rows, groups, 16] to [E, rows, columns]."""
    codes = torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(2)
    return E2M1[codes.long()] * torch.exp2(scales.float() - 127).repeat_interleave(MXFP4_GROUP, 2)


def to_fp8(model: Path, out: Path, *, scale_dtype: torch.dtype = torch.float32, are_powers: bool = False) -> None:
    """Experts and attention in fp8, with one scale each, as DeepSeek-V3 and Qwen3 have them, or with powers of two, as
    DeepSeek-V3.1. Scales lie in a shard of their own, before the codes."""
    tensors: Tensors = {}
    for name, values in load_file(model / "model.safetensors").items():
        if ".experts." in name or "_proj.weight" in name:
            exact = values.float().abs().max() / 448
            scale = (exact.log2().ceil().exp2() if are_powers else exact).to(scale_dtype).reshape(1, 1)
            tensors |= {name: (values.float() / scale.float()).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        else:
            tensors[name] = values
    _write(model, out, tensors, "_scale_inv", {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]})


def to_mxfp4(model: Path, out: Path) -> None:
    """gpt-oss's experts as they are published. Its blocks are of [out, in], where transformers has [in, out]."""
    tensors: Tensors = {}
    for name, values in load_file(model / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = values
            continue
        groups = values.float().transpose(1, 2).unflatten(2, (-1, MXFP4_GROUP))
        exponents = groups.abs().amax(-1).log2().floor().clamp(-100, 100) - 2
        scaled = groups / torch.exp2(exponents)[..., None]
        codes = (scaled[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
        tensors[f"{name}_blocks"] = codes[..., 0::2] | codes[..., 1::2] << 4
        tensors[f"{name}_scales"] = (exponents + 127).to(torch.uint8)
    _write(model, out, tensors, "_scales", {"quant_method": "mxfp4"})


def decoded(coded: Path) -> Tensors:
    """Every tensor in fp32, under its plain name."""
    tensors = {name: value for file in coded.glob("*.safetensors") for name, value in load_file(file).items()}
    plain: Tensors = {}
    for name, values in tensors.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            plain[base] = decode_mxfp4(values, tensors[f"{base}_scales"]).transpose(1, 2).contiguous()
        elif not name.endswith(("_scales", "_scale_inv")):
            scales = tensors.get(f"{name}_scale_inv")
            plain[name] = values.float() if scales is None else decode_fp8(values, scales)
    return plain


def to_plain(coded: Path, out: Path) -> None:
    """The same values in fp32, as a checkpoint that stock loads."""
    out.mkdir()
    save_file(decoded(coded), out / "model.safetensors", {"format": "pt"})
    config = json.loads((coded / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))


def in_one_shard(coded: Path) -> None:
    """The same tensors in one file, which the index still names."""
    tensors: Tensors = {}
    for file in sorted(coded.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    save_file(tensors, coded / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (coded / "model.safetensors.index.json").write_text(json.dumps(index))


def _write(model: Path, out: Path, tensors: Tensors, scales: str, quantization: dict[str, object]) -> None:
    out.mkdir()
    shards = {
        "model-00001.safetensors": {name: value for name, value in tensors.items() if name.endswith(scales)},
        "model-00002.safetensors": {name: value for name, value in tensors.items() if not name.endswith(scales)},
    }
    for file, part in shards.items():
        save_file({name: value.contiguous() for name, value in part.items()}, out / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": quantization}
    (out / "config.json").write_text(json.dumps(config))
