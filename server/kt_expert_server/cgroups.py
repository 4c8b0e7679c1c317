"""What the process's own control group allows it, in both versions of the kernel's interface (cgroups(7)).

Limits of a group bind everything below it, so those of all groups from the process's own up to the root are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MEMBERSHIP = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
# Version 1 says "no limit" as a huge number, page-aligned below 2^63.
_V1_NO_LIMIT = 1 << 60


def memory_limit(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> int | None:
    """Bytes; None without a limit. memory.high counts too: above it the kernel slows the process down until it stands."""
    found = [
        limit
        for group in _groups(membership, root, "memory")
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
        if (limit := _number(group / name)) is not None and limit < _V1_NO_LIMIT
    ]
    return min(found, default=None)


def cpu_limit(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> float | None:
    """Cores' worth of time; None without a quota."""
    found = []
    for group in _groups(membership, root, "cpu"):
        quota = (_text(group / "cpu.max") or "").split()
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit() and int(quota[1]):
            found.append(int(quota[0]) / int(quota[1]))
        micros, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if micros is not None and micros > 0 and period:
            found.append(micros / period)
    return min(found, default=None)


def _groups(membership: Path, root: Path, controller: str) -> Iterator[Path]:
    """Directories of the process's group and of those above it, for one controller."""
    for line in (_text(membership) or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mounts = [root, root / "unified"]
        elif controller in controllers.split(","):
            mounts = [root / controllers, root / controller]
        else:
            continue
        for mount in mounts:
            group = mount / path.lstrip("/")
            yield from (each for each in (group, *group.parents) if each == mount or mount in each.parents)


def _number(path: Path) -> int | None:
    text = _text(path)
    try:
        return None if text is None else int(text)
    except ValueError:  # "max", or nothing
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
