"""Shared memory as iceoryx2 passes it: what a library for nothing else takes for a message there and one back, neither of which
is written or read.

    python -m kt_expert_server.bench.iceoryx NAME SIZE      answers, until a line comes on standard input
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kt_expert_server.bench.processes import Process

_WAIT_S = 5.0
_LOOK_MS = 100  # between looks at whether to end


def is_installed() -> bool:
    return importlib.util.find_spec("iceoryx2") is not None


class Ends:
    """One side's: it sends messages of one size to the other, and waits for the other's."""

    def __init__(self, name: str, size: int, *, answers: bool) -> None:
        import iceoryx2

        iceoryx2.set_log_level(iceoryx2.LogLevel.Error)
        self._size = size
        self._wait = iceoryx2.Duration.from_millis(_LOOK_MS)
        self._node = iceoryx2.NodeBuilder.new().create(iceoryx2.ServiceType.Ipc)
        ways = ("back", "there") if answers else ("there", "back")
        out, back = (self._service(f"{name}/{way}").publish_subscribe(iceoryx2.Slice[ctypes.c_uint8]) for way in ways)
        rings, hears = (self._service(f"{name}/{way}/bell").event() for way in ways)
        self._publisher = out.open_or_create().publisher_builder().initial_max_slice_len(size).create()
        self._subscriber = back.open_or_create().subscriber_builder().create()
        self._notifier = rings.open_or_create().notifier_builder().create()
        self._listener = hears.open_or_create().listener_builder().create()

    def _service(self, name: str) -> Any:
        import iceoryx2

        return self._node.service_builder(iceoryx2.ServiceName.new(name))

    def send(self) -> None:
        self._publisher.loan_slice_uninit(self._size).assume_init().send()
        self._notifier.notify()

    def wait(self) -> None:
        """Until something may have come."""
        self._listener.timed_wait(self._wait)

    def receive(self, wait_s: float = _WAIT_S) -> bool:
        """False where none has come within that time."""
        deadline = time.monotonic() + wait_s
        while (sample := self._subscriber.receive()) is None:
            if time.monotonic() >= deadline:
                return False
            self._listener.timed_wait(self._wait)
        sample.delete()
        return True


@contextmanager
def connection(name: str, size: int) -> Iterator[tuple[Ends, Process]]:
    """To a process that answers, and the process. Raises InvalidRequest where that does not begin."""
    with Process("-m", "kt_expert_server.bench.iceoryx", name, str(size)) as other:
        other.line()
        yield Ends(name, size, answers=False), other
        other.tell(close=True)  # a process that is killed leaves its part of shared memory behind
        other.line()


def main(name: str, size: int) -> None:
    ends = Ends(name, size, answers=True)
    ended = threading.Event()

    def listen() -> None:
        sys.stdin.readline()
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    print("ready", flush=True)
    while not ended.is_set():
        if ends.receive(0.0):
            ends.send()
        else:
            ends.wait()
    del ends
    print("ended", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
