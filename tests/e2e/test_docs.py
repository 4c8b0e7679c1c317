"""Every command and every piece of Python in the documentation runs, in the order of its page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.server import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str, server: ServerProcess, checkpoint: Path) -> str:
    found = [code for kind, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]
    return "\n".join(found).replace("host:7443", server.address).replace("/models/Qwen3-30B-A3B", str(checkpoint))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page: Path, server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    """Its Python first, then its commands, in one folder."""
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for language, command in (("python", [sys.executable, "-c"]), ("sh", ["bash", "-euc"])):
        code = blocks(page, language, server, qwen3_checkpoint)
        result = subprocess.run(
            [*command, code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            env={**os.environ, "PATH": search},
        )
        assert result.returncode == 0, result.stderr
        if page.stem == "trainers" and language == "sh":
            assert "True" in result.stdout


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "README.md", ROOT / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\(([\w./-]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
