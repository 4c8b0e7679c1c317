"""gRPC ignores an option it does not know without a word, so every name is looked up in the library itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from grpc._cython import cygrpc

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for part in ("client", "server", "proto", "tests") for path in sorted((ROOT / part).rglob("*.py"))]


def option_names(path: Path) -> set[str]:
    """String constants that look like a channel argument."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("grpc."):
            found.add(node.value)
    return found


NAMES = sorted(set().union(*(option_names(path) for path in SOURCES if path.name != Path(__file__).name)) - {"grpc."})


@pytest.fixture(scope="module")
def library() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


def test_a_name_no_grpcio_knows_is_found_out(library: bytes) -> None:
    assert b"grpc.http2.min_recv_ping_interval_without_data_ms\0" not in library


@pytest.mark.parametrize("name", NAMES)
def test_the_library_knows_the_option(library: bytes, name: str) -> None:
    assert name.encode() + b"\0" in library
