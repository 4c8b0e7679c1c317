"""kt-expert, the operator's tool."""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path

import kt_expert_native as native
import pytest
from kt_expert_server.cli import bench
from kt_expert_server.cli.tool import main


def test_doctor_names_the_kernel_and_finds_no_problem(qwen3_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(qwen3_checkpoint)]) == 0
    printed = capsys.readouterr().out
    engine = native.Engine(1, os.environ.get("KT_EXPERT_ISA", ""))
    assert f"kernel in use         {engine.kernel('bf16')}: {engine.reason}" in printed
    assert "qwen3_moe, 3 MoE layers" in printed
    assert f"  layers in bf16      0-2 on {engine.kernel('bf16')}: {engine.reason}" in printed
    assert printed.endswith("ok\n")


def test_doctor_reports_a_model_it_cannot_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(tmp_path / "none")]) == 1
    assert "PROBLEM: model directory" in capsys.readouterr().out


def test_plan_prints_and_refuses(qwen3_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(qwen3_checkpoint)]) == 0
    assert "weights" in capsys.readouterr().out
    assert main(["plan", "--model", str(qwen3_checkpoint), "--memory-limit", "0.1"]) == 10
    assert "the limit is 102.4 MiB" in capsys.readouterr().err


def test_bench_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    command = ["bench", "kernels", "--shape", "tiny", "--tokens", "1,8", "--rank", "0,4,8", "--format", "bf16,int4-g32"]
    assert main([*command, "--against", "torch", "--repeats", "1", "--json", str(path), "--plot", str(plot)]) == 0
    figures = json.loads(path.read_text())
    assert {"isa", "threads", "fma_peak_gflops", "read_gbs", "rows"} <= set(figures)
    keys = {(row["tokens"], row["format"], row["rank"], row["pass"]) for row in figures["rows"]}
    assert keys == set(product((1, 8), ("bf16", "int4-g32"), (0, 4, 8), ("forward", "backward")))
    for row in figures["rows"]:
        assert row["seconds"] > 0
        assert row["gflops"] > 0
        assert row["bound_fraction"] > 0
        assert row["weight_error"] is None if row["format"] == "bf16" else 0 < row["weight_error"] < 0.3
        direction = row["pass"]
        peers = {"torch_fp32": direction == "forward", "torch_fp32_lora": row["rank"] > 0, "bf16": row["format"] != "bf16"}
        assert set(row["versus"]) == {name for name, is_there in peers.items() if is_there}
    assert plot.stat().st_size > 0
    capsys.readouterr()


def test_bench_measures_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.json"
    arguments = ["--shape", "4,64,32,2", "--json", str(path)]
    assert main(["bench", "memory", *arguments]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["tokens"], row["rank"]) == (512, 16)
    assert row["peak"] >= row["after_load"] > row["weights"] > 0
    assert row["allowed"] == int(1.05 * row["weights"]) + 300 * 1024**2
    assert "allowed" in capsys.readouterr().out
    assert main(["bench", "memory", "--tokens", "1,2"]) == 2


def test_bench_measures_the_trainers_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    sizes = ["--layers", "5", "--experts", "8", "--rank", "2", "--repeats", "1"]
    assert main(["bench", "trainer", *sizes, "--json", str(path)]) == 0
    assert "2 layers, 8 remote tensors" in capsys.readouterr().out
    found = json.loads(path.read_text(encoding="utf-8"))["trainer"]
    assert found["step_requests"] <= 2


def test_bench_measures_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "optimizers.json"
    assert main(["bench", "optimizer", "--shape", "4,64,32,2", "--rank", "4", "--repeats", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {(row["optimizer"], row["moments"]) for row in report["rows"]} >= {("adamw", "bf16"), ("adafactor", "fp32")}
    assert all(row["seconds"] > 0 and row["bandwidth_fraction"] > 0 and row["rank"] == 4 for row in report["rows"])
    assert report["update_gbs"] > 0
    assert "adafactor" in capsys.readouterr().out
    assert main(["bench", "optimizer", "--rank", "0,4"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "1,2"], "is neither one of"),
        (["--shape", "2,8,8,3"], "routes a token to 3 of 2 experts"),
        (["--format", "int3"], "'int3' is not available"),
        (["--tokens", "0"], "'0' is not a list of numbers of at least 1"),
        (["--against", "tinygrad"], "peer 'tinygrad' is not known"),
        (["--against", "kt-kernel"], "needs --kt-kernel-python"),
        (["--shape", "tiny", "--against", "kt-kernel", "--kt-kernel-python", "/no/python"], "cannot be started"),
        (
            ["--shape", "tiny", "--against", "kt-kernel", "--kt-kernel-python", f"{sys.executable} -S"],
            "ended with status 1 before it answered",
        ),
        (
            [
                *["--shape", "tiny", "--tokens", "1", "--against", "kt-kernel", "--kt-kernel-python"],
                "sh -c 'echo @ ready; exit 7'",
            ],
            "ended with status 7 before it answered",
        ),
    ],
)
def test_bench_names_what_it_cannot_do(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", *options]) == 2
    assert message in capsys.readouterr().err


def test_bench_against_torch_needs_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", "kernels", "--shape", "tiny", "--tokens", "1", "--against", "torch"]) == 2
    assert "--against torch needs torch" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["kernels", "memory", "optimizer"])
def test_bench_says_where_memory_is_short(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    per_expert = (
        4 * 3 * 4 * (64 + 32) * 4 if what == "optimizer" else native.LayerWeights.nbytes_of(native.LayerSpec(1, 64, 32))
    )
    monkeypatch.setattr(bench, "available_memory", lambda: int(5.5 * per_expert / 0.6))
    command = ["bench", what, "--shape", "8,64,32,2", "--tokens", "4", "--rank", "4", "--repeats", "1"]
    assert main(command) == 0
    assert "memory holds 5 of 8 experts" in capsys.readouterr().out
    monkeypatch.setattr(bench, "available_memory", lambda: per_expert)
    assert main(command) == 2
    assert "memory holds 0 experts of 8,64,32,2, fewer than a token's 2" in capsys.readouterr().err
