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
# Inside the server: what a part must not import.
FORBIDDEN_IN_SERVER = {
    "runtime": {"grpc", "kt_expert_server.api", "kt_expert_server.server", "kt_expert_server.cli", "prometheus_client"},
    "model": {
        "grpc",
        "kt_expert_server.api",
        "kt_expert_server.cli",
        "kt_expert_server.config",
        "kt_expert_server.runtime",
        "kt_expert_server.server",
    },
    "store": {"grpc", "kt_expert_server.api", "kt_expert_server.server"},
}
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


@pytest.mark.parametrize("part", FORBIDDEN_IN_SERVER)
def test_the_servers_parts_keep_their_order(part: str) -> None:
    for path in sources(PACKAGES["kt_expert_server"] / part):
        wrong = {name for name in imports(path) if starts(name, FORBIDDEN_IN_SERVER[part])}
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
