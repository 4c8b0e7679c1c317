"""kt-expert trace: runs a training and draws its calls on one time axis with what the server did for them.

    kt-expert trace --out trace.json --steps 10:12 -- accelerate launch train.py

Every process that the command starts writes the calls of those optimizer steps; they are put together into one file, which
https://ui.perfetto.dev opens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kt_expert_proto.environment import TRACE_STEPS_VARIABLE, TRACE_VARIABLE
from kt_expert_proto.steps import Steps

from kt_expert_server.errors import InvalidRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("trace.json"), metavar="FILE", help="default: trace.json")
    parser.add_argument("--steps", default=":", metavar="FIRST:LAST", help="optimizer steps, from FIRST to before LAST")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, after --")


def run(options: argparse.Namespace) -> int:
    """The command's own status; 2 where it left no trace."""
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise InvalidRequest("no command: give what to run after --, as in `kt-expert trace -- python train.py`")
    try:
        Steps.parse(options.steps)
    except ValueError as error:
        raise InvalidRequest(f"--steps: {error}") from None
    with tempfile.TemporaryDirectory() as folder:
        status = _run(command, {**os.environ, TRACE_VARIABLE: folder, TRACE_STEPS_VARIABLE: options.steps})
        found = sorted(Path(folder).glob("*.json"))
        if not found:
            raise InvalidRequest(
                f"the command ended with status {status} and left no trace: no process of it connected to a kt-expert-server"
            )
        events = merged([json.loads(path.read_text(encoding="utf-8")) for path in found])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
    spans = sum(event["ph"] != "M" for event in events)
    print(f"{spans} events of {len(found)} connections are in {options.out}; open it at https://ui.perfetto.dev")
    if not spans:
        print(f"no call was made in steps {options.steps}", file=sys.stderr)
    return status


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    try:
        return subprocess.run(command, env=environment, check=False).returncode
    except OSError as error:
        raise InvalidRequest(f"{command[0]!r} cannot be run: {error.strerror}") from None


def merged(traces: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Events of all, each process named once; times begin at zero."""
    events: list[dict[str, Any]] = []
    named: set[int] = set()
    for event in (event for trace in traces for event in trace["traceEvents"]):
        if event["ph"] == "M":
            if event["pid"] in named:
                continue
            named.add(event["pid"])
        events.append(event)
    begin = min((event["ts"] for event in events if "ts" in event), default=0.0)
    return [event | {"ts": event["ts"] - begin} if "ts" in event else event for event in events]
