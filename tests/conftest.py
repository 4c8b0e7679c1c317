"""Puts the test support packages on the path and starts the servers tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("KT_EXPERT_SERVER", None)

from support.absent import AbsentTrainers
from support.models import save_checkpoint
from support.server import ServerProcess


@pytest.fixture(scope="session")
def qwen3_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny qwen3_moe as a user has it on disk."""
    return save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="session")
def server(qwen3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all tests that leave it as they found it."""
    directory = tmp_path_factory.mktemp("server")
    options = ("--state-dir", str(directory / "state"), "--data-listen", "127.0.0.1:0")
    with ServerProcess(qwen3_checkpoint, directory / "log", *options) as process:
        yield process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What looks at the absent trainers comes last, so that they are away beside the rest."""
    items.sort(key=_uses_absent_trainers)


def _uses_absent_trainers(item: pytest.Item) -> bool:
    return "absent_trainers" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def _start_absent_trainers(request: pytest.FixtureRequest) -> None:
    """Before the first test, where theirs is among those that will run."""
    if any(_uses_absent_trainers(item) for item in request.session.items):
        request.getfixturevalue("absent_trainers")


@pytest.fixture(scope="session")
def absent_trainers(qwen3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AbsentTrainers]:
    started = AbsentTrainers(qwen3_checkpoint, tmp_path_factory.mktemp("absent"))
    yield started
    started.stop()
