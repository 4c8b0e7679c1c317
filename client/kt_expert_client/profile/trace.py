"""Calls as a Chrome trace (the "Trace Event Format" document of the Chromium project), which Perfetto opens.

All times are of the server's clock, so that files of several trainers fit on one axis.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kt_expert_proto.steps import Steps

from kt_expert_client.profile.times import CallTimes

MOST_CALLS = 100_000  # about 60 MB of events
_US_PER_S = 1e6
_SERVER = 0  # the process that all trainers see
_ENGINE_ROW = 1


class Trace:
    """A listener that keeps the calls of some steps and writes them when it is told to."""

    def __init__(self, path: Path, steps: Steps, name: str) -> None:
        self._path, self._steps, self._name = path, steps, name
        self._calls: list[CallTimes] = []
        self._left_out = 0

    def __call__(self, times: CallTimes) -> None:
        if not self._steps.has(times.stamps.step):
            return
        if len(self._calls) < MOST_CALLS:
            self._calls.append(times)
        else:
            self._left_out += 1

    def write(self) -> str:
        """Returns a sentence about it."""
        events = [_named(os.getpid(), f"trainer {self._name}"), _named(_SERVER, "kt-expert-server")]
        for number, times in enumerate(self._calls):
            events += _events(times, f"{os.getpid()}.{number}")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
        more = f"; {self._left_out} more were left out, choose fewer steps" if self._left_out else ""
        return f"{len(self._calls)} calls are in {self._path.name}{more}"


def _named(process: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}}


def _events(times: CallTimes, identity: str) -> Iterator[dict[str, Any]]:
    """What the trainer's threads did; the call on its way, as a span of its own; and the engine with its stages."""
    server, stamps, ahead = times.server, times.stamps, times.offset_s
    name = f"{times.op} of layer {times.layer}"
    about = {"tokens": times.tokens, "step": stamps.step}
    trainer = os.getpid()
    yield _span(trainer, stamps.thread, f"copy, {name}", stamps.asked + ahead, stamps.sent + ahead, about)
    if stamps.settled > times.wanted:
        yield _span(trainer, times.thread, f"wait, {name}", times.wanted + ahead, stamps.settled + ahead, about)
    begin_copy = max(stamps.settled, times.wanted)
    yield _span(trainer, times.thread, f"hand over, {name}", begin_copy + ahead, times.taken + ahead, about)
    for part, begin, end in (
        (name, stamps.sent + ahead, stamps.settled + ahead),
        ("send", stamps.sent + ahead, server.complete),
        ("queue", server.complete, server.begun),
        ("compute", server.begun, server.ended),
        ("back", server.ended, stamps.settled + ahead),
    ):
        yield from _async_span(trainer, part, identity, begin, max(begin, end))
    engine = about | {"together": server.together}
    yield _span(_SERVER, _ENGINE_ROW, name, server.begun, server.ended, engine)
    at = server.begun
    for stage, seconds in server.stages_s.items():
        yield _span(_SERVER, _ENGINE_ROW, stage, at, min(at + seconds, server.ended), {})
        at += seconds


def _span(process: int, row: int, name: str, begin: float, end: float, args: dict[str, Any]) -> dict[str, Any]:
    return {
        "ph": "X", "pid": process, "tid": row, "name": name, "cat": "kt_expert", "ts": begin * _US_PER_S,
        "dur": max(0.0, end - begin) * _US_PER_S, "args": args,
    }  # fmt: skip


def _async_span(process: int, name: str, identity: str, begin: float, end: float) -> Iterator[dict[str, Any]]:
    """Calls in flight overlap, which spans of one row may not."""
    about = {"pid": process, "tid": 0, "name": name, "cat": "calls in flight", "id": identity}
    yield about | {"ph": "b", "ts": begin * _US_PER_S}
    yield about | {"ph": "e", "ts": end * _US_PER_S}
