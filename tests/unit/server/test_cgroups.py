"""Limits of the process's own control group, in both versions of the interface."""

from __future__ import annotations

from pathlib import Path

import pytest
from kt_expert_server.cgroups import cpu_limit, memory_limit

GIB = 1 << 30
V2 = "0::/system.slice/kt-expert.service\n"
V1 = "5:memory:/system.slice/kt-expert.service\n4:cpu,cpuacct:/system.slice/kt-expert.service\n0::/\n"


def group(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    (root / "membership").write_text(membership)
    for name, content in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "membership", root / "cgroup"


SERVICE = "system.slice/kt-expert.service"
V1_CPU = f"cpu,cpuacct/{SERVICE}"
MEMORY = {
    "own group": (V2, {f"{SERVICE}/memory.max": f"{4 * GIB}\n", "memory.max": "max\n"}, 4 * GIB),
    "a group above": (V2, {f"{SERVICE}/memory.max": "max\n", "system.slice/memory.max": f"{2 * GIB}\n"}, 2 * GIB),
    "memory.high": (V2, {f"{SERVICE}/memory.max": f"{4 * GIB}\n", f"{SERVICE}/memory.high": f"{3 * GIB}\n"}, 3 * GIB),
    "the root alone": (V2, {"memory.max": f"{GIB}\n"}, GIB),
    "no limit": (V2, {f"{SERVICE}/memory.max": "max\n"}, None),
    "an empty file": (V2, {f"{SERVICE}/memory.max": ""}, None),
    "version 1": (V1, {f"memory/{SERVICE}/memory.limit_in_bytes": f"{5 * GIB}\n"}, 5 * GIB),
    "version 1 without": (V1, {f"memory/{SERVICE}/memory.limit_in_bytes": "9223372036854771712\n"}, None),
    "no cgroups": ("", {}, None),
}
CPU = {
    "own group": (V2, {f"{SERVICE}/cpu.max": "250000 100000\n"}, 2.5),
    "a group above": (V2, {f"{SERVICE}/cpu.max": "max 100000\n", "system.slice/cpu.max": "400000 100000\n"}, 4.0),
    "no limit": (V2, {f"{SERVICE}/cpu.max": "max 100000\n"}, None),
    "an empty file": (V2, {f"{SERVICE}/cpu.max": ""}, None),
    "version 1": (V1, {f"{V1_CPU}/cpu.cfs_quota_us": "150000", f"{V1_CPU}/cpu.cfs_period_us": "100000"}, 1.5),
    "version 1 without": (V1, {f"{V1_CPU}/cpu.cfs_quota_us": "-1", f"{V1_CPU}/cpu.cfs_period_us": "100000"}, None),
}  # fmt: skip


@pytest.mark.parametrize("what", MEMORY)
def test_memory(tmp_path: Path, what: str) -> None:
    membership, files, expected = MEMORY[what]
    assert memory_limit(*group(tmp_path, membership, files)) == expected


@pytest.mark.parametrize("what", CPU)
def test_cpu(tmp_path: Path, what: str) -> None:
    membership, files, expected = CPU[what]
    assert cpu_limit(*group(tmp_path, membership, files)) == expected
