"""Starts the real daemon for a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import TracebackType

STOP_TIMEOUT_S = 60.0


class ServerProcess:
    """kt-expert-server on free ports. `wait=False` leaves reading the ready line to the caller."""

    def __init__(self, model: Path, log: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "kt_expert_server", "--model", str(model)]
        for option in ("--listen", "--metrics-listen"):
            command += [] if option in arguments else [option, "127.0.0.1:0"]
        self.log = log
        self._log_file = log.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline().split()
        if not ready:
            self.process.wait(STOP_TIMEOUT_S)
            self.process.stdout.close()
            self._log_file.close()
            raise AssertionError(f"the server ended with {self.process.returncode}: {log.read_text(encoding='utf-8')}")
        assert ready[0] == "ready"
        self.address = ready[1].removeprefix("grpc=")
        self.metrics_address = ready[2].removeprefix("metrics=")
        self.data_address = ready[3].removeprefix("data=") if len(ready) > 3 else None

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def get(self, page: str) -> tuple[int, str]:
        """Status and body of a page on the metrics port."""
        try:
            with urllib.request.urlopen(f"http://{self.metrics_address}{page}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        """Value of one series, by its name with labels as exposed."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no series {name}")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(STOP_TIMEOUT_S)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log_file.close()
        return status
