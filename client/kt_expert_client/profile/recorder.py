"""Collects the times of a process's calls, for whoever asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from kt_expert_proto.header import Op

from kt_expert_client.profile.times import CallTimes, ClockOffset, Stamps
from kt_expert_client.session.calls import Call

Listener = Callable[[CallTimes], None]


class Recorder:
    """Of one client. Any thread may use it; what it has is told to its listeners, one call at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offset = ClockOffset()
        self._listeners: list[Listener] = []

    @property
    def is_on(self) -> bool:
        """Whether calls made from now on are measured."""
        return bool(self._listeners)

    def listen(self, listener: Listener) -> None:
        with self._lock:
            self._listeners.append(listener)

    def begin(self, step: int) -> Stamps | None:
        """For a call that begins now. None where nobody listens."""
        return Stamps(threading.get_native_id(), time.monotonic(), step) if self.is_on else None

    def end(self, call: Call, wanted: float) -> None:
        """The caller, who began to wait at `wanted`, has its result."""
        stamps, head = call.stamps, call.head
        if stamps is None or head is None or not head.HasField("timing"):
            return
        with self._lock:
            self._offset.learn(stamps.sent, stamps.settled, head.timing)
            op = "forward" if call.op is Op.FORWARD else "backward"
            times = CallTimes(
                op, call.layer, call.rows, stamps, wanted, time.monotonic(), threading.get_native_id(), head.timing,
                self._offset.offset_s,
            )  # fmt: skip
            for listener in self._listeners:
                listener(times)
