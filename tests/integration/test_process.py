"""The life of the process: start-up errors, draining, SIGTERM, a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import kt_expert_client as kt
import kt_expert_native as native
import pytest
import torch
from kt_expert_client import AdamW, LayerLora
from kt_expert_proto.v1 import service_pb2 as pb
from safetensors.torch import load_file, save_file
from support.batches import LAYERS, LORA, batch, train_step
from support.models import save_checkpoint
from support.server import ServerProcess
from support.waiting import wait_until


def run_server(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kt_expert_server", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **(environment or {})}
    )


def test_sigterm_finishes_what_was_accepted_and_exits_zero(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    server = ServerProcess(qwen3_checkpoint, tmp_path / "log")
    client = kt.connect(server.address)
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    x, ids, weights = batch(65536, 0)
    handles = [run.submit_forward(layer, x, ids, weights) for layer in range(LAYERS)]
    wait_until(lambda: server.metric("kt_expert_inflight_requests") == LAYERS)
    server.process.send_signal(signal.SIGTERM)
    outputs = [handle.result() for handle in handles]
    assert server.process.wait(60) == 0
    assert all(torch.isfinite(output).all() for output in outputs)
    with pytest.raises(kt.ServerUnavailable, match="there has been no connection for"):
        run.submit_forward(0, x, ids, weights, timeout_s=0.1).result()
    client.close()
    server.stop()


def test_draining_refuses_new_members_and_serves_old_ones(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(qwen3_checkpoint, tmp_path / "log") as server, kt.connect(server.address) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32")
        assert server.get("/readyz") == (200, "ready\n")
        client._stub.Drain(pb.DrainRequest())
        assert server.get("/readyz") == (503, "draining\n")
        assert server.get("/livez")[0] == 200
        with pytest.raises(kt.ServerUnavailable, match="draining"):
            client.open_run(lora=LORA)
        train_step(run, 0)
        assert run.step(AdamW(1e-2)) == 1


def break_index(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    save_file(tensors, directory / "model-00001-of-00002.safetensors")
    names["gone"] = "model-00002-of-00002.safetensors"
    index = {"metadata": {}, "weight_map": names}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 20_000)


def not_moe(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text(config.read_text().replace("qwen3_moe", "llama"))


def without_experts(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".experts." not in name}
    save_file(kept, directory / "model.safetensors")


def one_expert_missing(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")


def garbage(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\xff" * 64)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (break_index, "1 of 2 shards are missing, the first is model-00002-of-00002.safetensors"),
    "truncated": (truncate, "lies outside the file; the file is truncated or damaged"),
    "not a MoE": (not_moe, "model_type 'llama' is not a supported mixture-of-experts architecture; supported: deepseek_v2"),
    "no experts": (without_experts, "has no expert tensors"),
    "one tensor missing": (one_expert_missing, "experts.3.up_proj.weight is missing from the checkpoint"),
    "garbage": (garbage, "is not a safetensors file"),
    "no config": (lambda directory: (directory / "config.json").unlink(), "cannot read"),
    "no weights": (lambda directory: (directory / "model.safetensors").unlink(), "has neither"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_directory_is_named(what: str, tmp_path: Path) -> None:
    change, text = BROKEN[what]
    change(save_checkpoint("qwen3_moe", tmp_path / "model"))
    result = run_server("--model", str(tmp_path / "model"), "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
    assert result.returncode == 10, result.stderr
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_start_up_errors_have_their_own_status(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    model = ["--model", str(qwen3_checkpoint)]
    free = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    cases = [
        (["--model", str(tmp_path / "none"), *free], 10, "does not exist"),
        ([*model, "--listen", server.address, "--metrics-listen", "127.0.0.1:0"], 11, "the port is in use"),
        ([*model, "--listen", "127.0.0.1:0", "--metrics-listen", server.metrics_address], 11, "cannot listen for metrics"),
        ([*model, "--listen", "nowhere", "--metrics-listen", "127.0.0.1:0"], 2, "is not host:port"),
        ([*model, *free, "--threads", "0"], 2, "expected at least 1"),
        ([*model, *free, "--threads", "9999"], 2, "thread count 9999 is outside [1, 1024]"),
        ([*model, *free, "--memory-limit", "nan"], 2, "--memory-limit is nan, expected a number of at least 0"),
        ([*model, *free, "--memory-limit", "0.1"], 10, "the model needs 300.1 MiB"),
    ]
    for arguments, status, text in cases:
        result = run_server(*arguments)
        assert result.returncode == status, result.stderr
        assert text in result.stderr
        assert "Traceback" not in result.stderr
    forced = run_server(*model, *free, environment={"KT_EXPERT_ISA": "pentium"})
    assert forced.returncode != 0
    assert "instruction set 'pentium' is not known" in forced.stderr
    assert "Traceback" not in forced.stderr
    for isa in [name for name, obstacle in native.list_isas() if obstacle][-1:]:
        absent = run_server(*model, *free, environment={"KT_EXPERT_ISA": isa})
        assert absent.returncode != 0
        assert f"instruction set '{isa}' was asked for, but" in absent.stderr


def test_too_few_open_files_are_told_at_the_start(qwen3_checkpoint: Path) -> None:
    server = (
        f"{sys.executable} -m kt_expert_server --model {qwen3_checkpoint} --listen 127.0.0.1:0 --metrics-listen 127.0.0.1:0"
    )
    result = subprocess.run(
        ["sh", "-c", f"ulimit -n 32; exec {server}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2, result.stderr
    assert "may open 32 files, expected at least 128; raise the limit (ulimit -n 4096" in result.stderr


def test_the_resident_format_is_the_operators_choice(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    x, ids, weights = batch(9, 0)
    outputs = []
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", "--weight-format", "int8") as int8:
        for address in (server.address, int8.address):
            with kt.connect(address) as client:
                run = client.open_run(lora=LORA, wire_dtype="fp32")
                outputs.append(run.submit_forward(0, x, ids, weights).result())
                formats = {kernel.weight_format for kernel in client.status().kernels}
        assert formats == {"int8"}
        assert int8.metric('kt_expert_memory_bytes{kind="weights"}') < server.metric('kt_expert_memory_bytes{kind="weights"}')
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 1e-4 < error < 0.05


def test_a_full_disk_fails_the_save_and_nothing_else(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    """The limit on file sizes stands in for a full disk: the kernel answers EFBIG where a disk answers ENOSPC."""
    command = f'ulimit -f 64 && exec {sys.executable} -m kt_expert_server "$@"'  # 64 blocks of 1 KiB
    arguments = ["--model", str(qwen3_checkpoint), "--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
    state = tmp_path / "state"
    process = subprocess.Popen(
        ["bash", "-c", command, "server", *arguments, "--state-dir", str(state)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    address = process.stdout.readline().split()[1].removeprefix("grpc=")
    with kt.connect(address) as client:
        wide = [LayerLora(layer, False, 64, 64, 64, 1.0, 1.0, 1.0) for layer in range(LAYERS)]
        run = client.open_run(lora=wide, wire_dtype="fp32")
        train_step(run, 0)
        with pytest.raises(kt.OutOfCapacity, match="the disk of --state-dir is full"):
            run.save_checkpoint("large")
        assert not any((state / "checkpoints").iterdir())
        assert run.step(AdamW(1e-2)) == 1
        small = client.open_run(lora=[LayerLora(0, rank_down=1, scale_down=1.0)], wire_dtype="fp32")
        assert small.save_checkpoint("small")
    process.terminate()
    assert process.wait(60) == 0
    process.stdout.close()


def test_weights_cut_for_several_nodes_compute_the_same(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    x, ids, weights = batch(40, 3)
    results = []
    for nodes in ("1", "3"):
        log = tmp_path / nodes
        with ServerProcess(qwen3_checkpoint, log, "--nodes", nodes) as server, kt.connect(server.address) as client:
            run = client.open_run(lora=LORA, wire_dtype="fp32", seed=4)
            handle = run.submit_forward(0, x, ids, weights)
            output = handle.result()
            results.append([output, *run.submit_backward(0, handle.ticket, output).result()])
    assert "cut into 3 slices, on no particular memory" in (tmp_path / "3").read_text()
    for one, three in zip(*results, strict=True):
        assert torch.allclose(one, three, rtol=1e-5, atol=1e-6)


def test_a_number_of_nodes_without_a_meaning_is_refused(qwen3_checkpoint: Path) -> None:
    result = run_server("--model", str(qwen3_checkpoint), "--nodes", "many")
    assert result.returncode == 2
    assert "--nodes is 'many', expected a number in [1, 64], or auto" in result.stderr
