"""Who may know whom: client -> proto <- server -> native, and nothing the other way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "kt_expert_proto": ROOT / "proto" / "kt_expert_proto",
    "kt_expert_client": ROOT / "client" / "kt_expert_client",
    "kt_expert_server": ROOT / "server" / "kt_expert_server",
    "kt_expert_native": ROOT / "native" / "kt_expert_native",
}
ALLOWED = {
    "kt_expert_proto": set(),
    "kt_expert_client": {"kt_expert_proto"},
    "kt_expert_server": {"kt_expert_proto", "kt_expert_native"},
    "kt_expert_native": set(),
}
# Inside the server: parts from the bottom to the top. A part may import itself and those below it.
SERVER_LAYERS = ("model", "adapters", "engine", "checkpoints", "members", "edge")
SERVER_LEAVES = {"errors", "names", "observe.observer"}  # which everybody may import
ON_TOP = {
    "kt_expert_server.config",
    "kt_expert_server.server",
    "kt_expert_server.cli",
    "kt_expert_server.bench",
    "kt_expert_server.observe.metrics",
}
# The cores of both sides do no I/O, know no clock and draw no random numbers.
CORES = (
    *(ROOT / "server" / "kt_expert_server" / part for part in ("members", "adapters", "engine", "checkpoints")),
    *(
        ROOT / "client" / "kt_expert_client" / "session" / f"{name}.py"
        for name in ("core", "actions", "attempts", "calls", "inflight", "journal", "recovery")
    ),
)
NOT_IN_CORES = {"asyncio", "grpc", "prometheus_client", "random", "secrets", "select", "socket", "time", "uuid"}
HAS_DISK = {"filesystem.py"}  # what a simulator replaces
HAS_LOCK = {"buffers.py"}  # used from several threads
FORBIDDEN_EVERYWHERE = {"pickle", "cloudpickle", "marshal", "shelve", "dill"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def sources(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*.py")) if "_pb2" not in path.name]


def starts(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_is_below_them(package: str) -> None:
    others = set(PACKAGES) - {package} - ALLOWED[package]
    for path in sources(PACKAGES[package]):
        wrong = {name for name in imports(path) if starts(name, others | FORBIDDEN_EVERYWHERE)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


@pytest.mark.parametrize("part", SERVER_LAYERS)
def test_the_servers_parts_keep_their_order(part: str) -> None:
    above = SERVER_LAYERS[SERVER_LAYERS.index(part) + 1 :]
    forbidden = {f"kt_expert_server.{other}" for other in above} | (ON_TOP if part != "edge" else set())
    for path in sources(PACKAGES["kt_expert_server"] / part):
        wrong = {name for name in imports(path) if starts(name, forbidden)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_cores_do_no_io() -> None:
    paths = [path for core in CORES for path in (sources(core) if core.is_dir() else [core])]
    assert len(paths) > 30
    for path in paths:
        allowed = {"threading"} if path.name in HAS_LOCK else set()
        forbidden = NOT_IN_CORES | {"threading", "concurrent"} - allowed
        if path.name not in HAS_DISK:
            forbidden |= {"os", "shutil", "tempfile", "pathlib"}
        wrong = {name for name in imports(path) if starts(name, forbidden)}
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_the_server_does_not_need_torch() -> None:
    """torch would cost the server a quarter of a gigabyte; only the benchmark, beside it, may use it."""
    for path in sources(PACKAGES["kt_expert_server"]):
        if path.parent.name != "bench":
            assert not {name for name in imports(path) if starts(name, {"torch", "transformers"})}, path


def test_intrinsics_stay_in_the_kernel_files() -> None:
    for path in sorted((ROOT / "native").rglob("*")):
        if path.suffix in {".h", ".cc", ".inc"} and not path.name.startswith("x86_"):
            text = path.read_text(encoding="utf-8")
            assert "immintrin.h" not in text, path
            assert "_mm256" not in text, path


def test_instruction_set_flags_go_to_kernel_files_alone() -> None:
    """The built objects are checked by native/tests/object_code_test.py; this sees the intent."""
    flags = (ROOT / "native" / "CMakeLists.txt").read_text(encoding="utf-8")
    assert "-march=" not in flags
    for line in flags.splitlines():
        if "-mavx" in line or "-mamx" in line:
            assert line.startswith(("set_source_files_properties(${KT_EXPERT_", "set(KT_EXPERT_AVX512_FLAGS ")), line
