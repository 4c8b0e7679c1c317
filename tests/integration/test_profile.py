"""Where a real trainer's time went, as it is told at the end, in metrics and in a trace of both processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import kt_expert_client as kt
import pytest
from kt_expert_client.profile.times import CallTimes
from prometheus_client import CollectorRegistry
from support.batches import LAYERS, LORA, train_step
from support.server import ServerProcess

STEPS = 3
TRAINER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
import kt_expert_client as kt
from support.batches import LORA, train_step
with kt.connect(sys.argv[1]) as client:
    run = client.open_run(lora=LORA)
    for step in range({STEPS}):
        train_step(run, step)
        run.step(kt.AdamW(1e-3))
    run.leave()
"""
TOOL = (sys.executable, "-m", "kt_expert_server.cli.tool", "trace")


@pytest.mark.parametrize("transport", ["stream", "tcp", "same-host"])
def test_every_call_is_accounted_for(server: ServerProcess, transport: str) -> None:
    heard: list[CallTimes] = []
    registry = CollectorRegistry()
    with kt.connect(server.address, transport=transport) as client:
        run = client.open_run(lora=LORA)
        train_step(run, 0)  # not measured: nobody listens yet
        client.recorder.listen(heard.append)
        client.export_metrics(registry)
        train_step(run, 1, tokens=6)
        run.leave()
    assert [(each.op, each.layer) for each in heard] == [
        (op, layer) for layer in range(LAYERS) for op in ("forward", "backward")
    ]
    for each in heard:
        parts, server_times = each.parts, each.server
        assert server_times.received <= server_times.complete <= server_times.begun <= server_times.ended
        assert 0.0 < server_times.compute_s <= server_times.ended - server_times.begun
        assert 0.0 < sum(server_times.stages_s.values()) <= server_times.compute_s
        assert parts.whole >= parts.compute
        # On one host the clocks are the same: the estimate may be wrong by half of the quickest way.
        assert abs(each.offset_s) <= min(times.stamps.settled - times.stamps.sent for times in heard)
    assert registry.get_sample_value("kt_expert_client_tokens_total", {"op": "forward"}) == 6 * LAYERS


def run(command: tuple[str, ...], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120)


def test_a_profile_is_printed_when_the_training_ends(server: ServerProcess) -> None:
    ended = run((sys.executable, "-c", TRAINER, server.address), KT_EXPERT_PROFILE="1")
    assert ended.returncode == 0, ended.stderr
    (row,) = [line.split() for line in ended.stderr.splitlines() if line.startswith("forward")]
    assert row[1] == str(STEPS * LAYERS)
    assert ended.stderr.count("the trainer waited") == 1


def test_a_trace_of_chosen_steps_has_both_processes(server: ServerProcess, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "trace.json"
    ended = run((*TOOL, "--out", str(out), "--steps", "1:3", "--", sys.executable, "-c", TRAINER, server.address))
    assert ended.returncode == 0, ended.stderr
    events = json.loads(out.read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {"trainer 0", "kt-expert-server"}
    engine = [event for event in events if event["ph"] == "X" and event["pid"] == 0 and "together" in event["args"]]
    assert [event["args"]["step"] for event in engine] == [1] * 2 * LAYERS + [2] * 2 * LAYERS
    assert min(event["ts"] for event in events if "ts" in event) == 0.0
    assert {"gate_up", "down", "lora"} <= {event["name"] for event in events}


def test_a_command_that_fails_or_connects_nowhere(tmp_path: Path) -> None:
    nothing = run((*TOOL, "--out", str(tmp_path / "trace.json"), "--", "true"))
    assert nothing.returncode == 2
    assert "left no trace" in nothing.stderr
    absent = run((*TOOL, "--", "no-such-command"))
    assert absent.returncode == 2
    assert "'no-such-command' cannot be run" in absent.stderr
    backwards = run((*TOOL, "--steps", "3:1", "--", "true"))
    assert "the last one must come after the first" in backwards.stderr
    assert "no command" in run(TOOL).stderr
