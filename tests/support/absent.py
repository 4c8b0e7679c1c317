"""Trainers and a server of their own that are started first and looked at last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.server import ServerProcess

IDLE_S = 240.0
_SLACK_S = 90.0
_SCRIPT = Path(__file__).resolve().parent.parent / "fault" / "absent_trainer.py"
_HOW = (
    ("before", IDLE_S), ("between", IDLE_S), ("within", IDLE_S), ("after", IDLE_S),
    ("busy", 100.0), ("stopped", 40.0), ("stopped", 110.0),
)  # fmt: skip


class AbsentTrainers:
    """Run beside the other tests."""

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        self._server = ServerProcess(checkpoint, directory / "log")
        self._processes: dict[str, subprocess.Popen[str]] = {}
        for mode, seconds in _HOW:
            command = [sys.executable, str(_SCRIPT), self._server.address, mode, str(seconds)]
            self._processes[f"{mode} {seconds:g}"] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    @property
    def names(self) -> list[str]:
        return list(self._processes)

    def wait(self) -> dict[str, str]:
        """What each trainer printed at its end."""
        return {name: process.communicate(timeout=IDLE_S + _SLACK_S)[0] for name, process in self._processes.items()}

    def server_log(self) -> str:
        return self._server.log.read_text(encoding="utf-8")

    def stop(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.communicate()
        self._server.stop()
