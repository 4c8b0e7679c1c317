"""A trainer and a server of its own that are started first and looked at last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.server import ServerProcess

IDLE_S = 200.0
_SLACK_S = 90.0
_SCRIPT = Path(__file__).resolve().parent.parent / "fault" / "idle_trainer.py"


class IdleTrainer:
    """Runs beside the other tests."""

    def __init__(self, checkpoint: Path, directory: Path) -> None:
        self._server = ServerProcess(checkpoint, directory / "log")
        command = [sys.executable, str(_SCRIPT), self._server.address, str(IDLE_S)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def wait(self) -> str:
        """What the trainer printed at its end."""
        printed, _ = self._process.communicate(timeout=IDLE_S + _SLACK_S)
        return printed

    def server_log(self) -> str:
        return self._server.log.read_text(encoding="utf-8")

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._server.stop()
