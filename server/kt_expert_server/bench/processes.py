"""Child processes of a benchmark: a real server, and what is talked to line by line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from kt_expert_server.errors import InvalidRequest

_ANSWER_TIMEOUT_S = 300.0  # a server loads its model, or a round of calls is made
_NS_PER_S = 1e9


def cpu_s_of(pid: int) -> float:
    """Processor seconds of all threads that a process has now."""
    spent = (task.joinpath("schedstat").read_text().split()[0] for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(map(int, spent)) / _NS_PER_S


class Process:
    """A child that is talked to line by line."""

    def __init__(self, *command: str, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: variables beside this process's own."""
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None  # noqa: S101  # pipes were asked for
            stream.close()
        self._process.terminate()
        self._process.wait()

    def cpu_s(self) -> float:
        return cpu_s_of(self._process.pid)

    def line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101
        too_late = threading.Timer(_ANSWER_TIMEOUT_S, self._process.kill)
        too_late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            too_late.cancel()
        if not line:
            raise InvalidRequest(
                f"a process of the benchmark has ended, or has not answered within {_ANSWER_TIMEOUT_S:g} s; it needs "
                "kt-expert[client]"
            )
        return line

    def tell(self, **asked: object) -> None:
        assert self._process.stdin is not None  # noqa: S101
        self._process.stdin.write(json.dumps(asked) + "\n")

    def answer(self) -> dict[str, Any]:
        """To what was told first of all that has no answer yet."""
        return cast("dict[str, Any]", json.loads(self.line()))

    def ask(self, **asked: object) -> dict[str, Any]:
        self.tell(**asked)
        return self.answer()


@contextmanager
def serve(model: Path, threads: int, *options: str) -> Iterator[tuple[Process, str]]:
    """A server on free ports, and its address."""
    ports = [part for option in ("--listen", "--metrics-listen", "--data-listen") for part in (option, "127.0.0.1:0")]
    arguments = ("--model", str(model), *ports, "--threads", str(threads), *options)
    with Process("-m", "kt_expert_server", *arguments) as server:
        yield server, server.line().split()[1].removeprefix("grpc=")
