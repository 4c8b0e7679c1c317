"""kt-expert, the operator's tool."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kt_expert_server.cli.tool import main


def test_doctor_names_the_kernel_and_finds_no_problem(qwen3_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(qwen3_checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert "kernel in use" in printed
    assert "qwen3_moe, 3 MoE layers" in printed
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
    path = tmp_path / "bench.json"
    assert main(["bench", "layer", "--shape", "tiny", "--tokens", "1,8", "--repeats", "1", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert [(row["tokens"], row["direction"]) for row in figures["rows"]] == [
        (1, "forward"),
        (1, "backward"),
        (8, "forward"),
        (8, "backward"),
    ]
    assert all(row["seconds"] > 0 for row in figures["rows"])
    assert main(["bench", "layer", "--shape", "1,2"]) == 2
    assert "is neither one of" in capsys.readouterr().err
