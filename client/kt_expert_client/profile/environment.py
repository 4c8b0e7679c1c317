"""What the environment asks to be measured, and where it goes when the training ends."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from kt_expert_proto.environment import TRACE_STEPS_VARIABLE, TRACE_VARIABLE
from kt_expert_proto.steps import Steps

from kt_expert_client.errors import InvalidRequest
from kt_expert_client.profile.recorder import Recorder
from kt_expert_client.profile.table import Summary
from kt_expert_client.profile.trace import Trace

PROFILE_VARIABLE = "KT_EXPERT_PROFILE"


class Report:
    """What is said once at the end: when the client is closed or when the process ends, whichever comes first."""

    def __init__(self, *says: Callable[[], str]) -> None:
        self._says = says
        rank = os.environ.get("RANK")  # torchrun's
        self._who = "kt-expert" if rank is None else f"kt-expert, rank {rank}"
        self._pid = os.getpid()
        self._is_said = False
        atexit.register(self.say)

    def say(self) -> None:
        if self._is_said or os.getpid() != self._pid:
            return
        self._is_said = True
        atexit.unregister(self.say)
        for text in (each() for each in self._says):
            if text:
                sys.stderr.write(f"{self._who}: {text}\n")


def measure_as_asked(recorder: Recorder, environment: Mapping[str, str]) -> Report | None:
    """Listens as KT_EXPERT_PROFILE and KT_EXPERT_TRACE say. None where they ask for nothing. Raises InvalidRequest."""
    says: list[Callable[[], str]] = []
    asked = environment.get(PROFILE_VARIABLE, "0")
    if asked not in ("0", "1"):
        raise InvalidRequest(f"{PROFILE_VARIABLE} is {asked!r}, expected 0 or 1")
    if asked == "1":
        summary = Summary()
        recorder.listen(summary)
        says.append(summary.text)
    directory = environment.get(TRACE_VARIABLE, "")
    if directory:
        name = environment.get("RANK", "0")
        path = Path(directory) / f"trace-{name}-{os.getpid()}-{id(recorder):x}.json"
        try:
            steps = Steps.parse(environment.get(TRACE_STEPS_VARIABLE, ":"))
        except ValueError as error:
            raise InvalidRequest(f"{TRACE_STEPS_VARIABLE}: {error}") from None
        trace = Trace(path, steps, name)
        recorder.listen(trace)
        says.append(trace.write)
    elif TRACE_STEPS_VARIABLE in environment:
        raise InvalidRequest(f"{TRACE_STEPS_VARIABLE} is set, but not {TRACE_VARIABLE}, the folder that traces are written to")
    return Report(*says) if says else None
