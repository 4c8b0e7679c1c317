"""What is made of the times of calls: parts, the offset of the clocks, the table, the trace and the metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kt_expert_client.errors import InvalidRequest
from kt_expert_client.profile.environment import measure_as_asked
from kt_expert_client.profile.metrics import CallMetrics
from kt_expert_client.profile.recorder import Recorder
from kt_expert_client.profile.table import Summary
from kt_expert_client.profile.times import PARTS, CallTimes, ClockOffset, Stamps
from kt_expert_client.profile.trace import Trace
from kt_expert_client.session.calls import Call
from kt_expert_proto.header import Op
from kt_expert_proto.steps import Steps
from kt_expert_proto.v1.session_pb2 import RequestOpen, ResultHead, Timing
from prometheus_client import CollectorRegistry

AHEAD = 1000.0  # seconds that the server's clock is ahead


def call_times(*, begin: float = 10.0, step: int = 0, wanted: float = 10.05, thread: int = 7, together: int = 1) -> CallTimes:
    """10 ms of copy, 20 of sending, 5 in the queue, 40 of compute, 15 back, 2 to hand over; wanted 50 ms after the call."""
    server = Timing(
        received=begin + 0.012 + AHEAD, complete=begin + 0.030 + AHEAD, begun=begin + 0.035 + AHEAD,
        ended=begin + 0.075 + AHEAD, compute_s=0.040, together=together, stages_s={"gate_up": 0.03, "down": 0.01},
    )  # fmt: skip
    stamps = Stamps(thread, begin, step, begin + 0.010, begin + 0.090)
    return CallTimes("forward", 3, 16, stamps, wanted, begin + 0.092, thread, server, AHEAD)


def test_parts_add_up_to_the_time_from_the_call_to_the_result() -> None:
    parts = call_times().parts
    expected = {"copy": 10, "send": 20, "queue": 5, "compute": 40, "back": 15, "hand_over": 2, "waited": 40, "whole": 92}
    assert {name: round(1000 * getattr(parts, name), 6) for name in PARTS} == expected
    on_the_way = parts.copy + parts.send + parts.queue + parts.compute + parts.back + parts.hand_over
    assert on_the_way == pytest.approx(parts.whole)


def test_who_comes_late_has_not_waited() -> None:
    parts = call_times(wanted=10.091).parts
    assert parts.waited == 0.0
    assert parts.hand_over == pytest.approx(0.001)


def test_the_offset_is_that_of_the_quickest_call() -> None:
    offset = ClockOffset()
    # The slow one's way back takes 80 ms, the quick one's 1 ms each way.
    offset.learn(1.000, 1.101, Timing(received=1.001 + AHEAD, ended=1.021 + AHEAD))
    offset.learn(2.000, 2.022, Timing(received=2.001 + AHEAD, ended=2.021 + AHEAD))
    offset.learn(3.000, 3.101, Timing(received=3.080 + AHEAD, ended=3.100 + AHEAD))
    assert offset.offset_s == pytest.approx(AHEAD)


@pytest.mark.parametrize(
    ("text", "inside", "outside"), [(":", [0, 99], []), ("3", [3], [2, 4]), ("3:5", [3, 4], [2, 5]), (":2", [0, 1], [2])]
)
def test_steps(text: str, inside: list[int], outside: list[int]) -> None:
    steps = Steps.parse(text)
    assert all(map(steps.has, inside))
    assert not any(map(steps.has, outside))


@pytest.mark.parametrize("text", ["", "a", "1:b", "-1", "5:5", "5:2", "1:2:3", "1.5"])
def test_steps_that_make_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="steps are"):
        Steps.parse(text)


def test_the_table_has_means_stages_and_what_the_trainer_waited() -> None:
    summary = Summary()
    assert summary.text() == ""
    summary(call_times())
    summary(call_times(begin=11.0, wanted=11.05, together=3))
    text = summary.text()
    (row,) = [line.split() for line in text.splitlines() if line.startswith("forward")]
    assert row == ["forward", "2", "10.00", "20.00", "5.00", "40.00", "15.00", "2.00", "40.00", "92.00"]
    assert "the engine, forward: gate_up 75%, down 25%" in text
    assert "the trainer waited 0.08 s of the 1.09 s" in text
    assert "50% of the calls shared a pass" in text


def test_a_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "folder" / "trace.json", Steps(1, 2), "0")
    for step in (0, 1, 2):
        trace(call_times(begin=10.0 + step, wanted=10.05 + step, step=step))
    assert trace.write() == "1 calls are in trace.json"
    events = json.loads((tmp_path / "folder" / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["args"].get("step", 1) for event in spans} == {1}
    # Spans of one row lie in or beside one another.
    for one in spans:
        for other in spans:
            if (one["pid"], one["tid"]) == (other["pid"], other["tid"]):
                begins = sorted((one, other), key=lambda event: (event["ts"], -event["dur"]))
                first, second = begins
                slack = 1e-3  # microseconds
                apart = second["ts"] >= first["ts"] + first["dur"] - slack
                inside = second["ts"] + second["dur"] <= first["ts"] + first["dur"] + slack
                assert apart or inside, (first, second)
    begun = sorted((event["id"], event["name"]) for event in events if event["ph"] == "b")
    assert begun == sorted((event["id"], event["name"]) for event in events if event["ph"] == "e")
    engine = next(event for event in spans if event["name"] == "forward of layer 3" and event["pid"] == 0)
    assert engine["dur"] == pytest.approx(40_000)


def test_metrics_in_a_registry() -> None:
    registry = CollectorRegistry()
    metrics = CallMetrics(registry)
    metrics(call_times())
    labels = {"op": "forward", "part": "queue"}
    assert registry.get_sample_value("kt_expert_client_call_seconds_sum", labels) == pytest.approx(0.005)
    assert registry.get_sample_value("kt_expert_client_tokens_total", {"op": "forward"}) == 16
    with pytest.raises(InvalidRequest, match="another client already"):
        CallMetrics(registry)


def test_nothing_is_measured_where_nobody_listens() -> None:
    recorder = Recorder()
    assert recorder.begin(0) is None
    heard: list[CallTimes] = []
    recorder.listen(heard.append)
    stamps = recorder.begin(4)
    assert stamps is not None
    call = Call(Op.BACKWARD, RequestOpen(), 1.0, layer=2, rows=5, stamps=stamps)
    recorder.end(call, 0.0)  # a server that says nothing of it
    call.head = ResultHead()
    recorder.end(call, 0.0)
    assert not heard
    call.head.timing.ended = 1.0
    recorder.end(call, 0.0)
    assert [(times.op, times.layer, times.tokens, times.stamps.step) for times in heard] == [("backward", 2, 5, 4)]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"KT_EXPERT_PROFILE": "yes"}, "expected 0 or 1"),
        ({"KT_EXPERT_TRACE_STEPS": "1:2"}, "but not KT_EXPERT_TRACE"),
        ({"KT_EXPERT_TRACE": "x", "KT_EXPERT_TRACE_STEPS": "2:1"}, "KT_EXPERT_TRACE_STEPS: steps are '2:1'"),
    ],
)
def test_an_environment_that_makes_no_sense(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        measure_as_asked(Recorder(), environment)


def test_an_environment_that_asks_for_nothing() -> None:
    recorder = Recorder()
    assert measure_as_asked(recorder, {"KT_EXPERT_PROFILE": "0"}) is None
    assert not recorder.is_on
