"""Configuration of one server process: validated once, here, then trusted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import kt_expert_native as native

from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.loader import AUTO_FORMAT
from kt_expert_server.model.placement import Placement

DEFAULT_LISTEN = "127.0.0.1:7443"
DEFAULT_METRICS_LISTEN = "127.0.0.1:9464"
WEIGHT_FORMATS = tuple(native.list_weight_formats())
SERVED_FORMATS = (AUTO_FORMAT, *WEIGHT_FORMATS)
ISA_VARIABLE = "KT_EXPERT_ISA"  # forces an instruction set
_ADDRESS = re.compile(r"^(?P<host>[^:\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})$")
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """host:port; port 0 takes a free one."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises InvalidRequest for anything but host:port."""
        match = _ADDRESS.match(text)
        if match is None or int(match["port"]) > _MAX_PORT:
            raise InvalidRequest(f"address {text!r} is not host:port with a port up to {_MAX_PORT}")
        return cls(match["host"], int(match["port"]))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds that keep one trainer from starving the others."""

    max_tokens: int = 65536  # per request; a micro-batch of 64 sequences of 1024
    max_request_bytes: int = 2 * 1024**3  # tensors of one request
    credit_requests: int = 4  # in flight per member: two micro-batches, each with one call ahead
    credit_bytes: int = 2 * 1024**3  # in flight per member
    max_members: int = 64  # joined at once, over all runs
    lease_s: float = 30.0  # a member without a stream for this long is dropped
    default_deadline_s: float = 600.0  # of a request that names none
    max_barrier_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything the daemon is told on its command line."""

    model_dir: Path
    listen: Address
    metrics_listen: Address
    state_dir: Path | None
    threads: int
    weight_format: str
    isa: str
    memory_limit_bytes: int
    shutdown_timeout_s: float
    placement: Placement
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.weight_format not in SERVED_FORMATS:
            raise InvalidRequest(
                f"weight format {self.weight_format!r} is not available; choose one of: {', '.join(SERVED_FORMATS)}"
            )
        if self.threads < 1:
            raise InvalidRequest(f"threads is {self.threads}, expected at least 1")


def available_cores() -> int:
    """Cores this process may run on: its affinity, cut by the cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    quota = _read_text(Path("/sys/fs/cgroup/cpu.max"))
    if quota is not None and not quota.startswith("max"):
        allowed, period = (int(part) for part in quota.split()[:2])
        cores = max(1, min(cores, allowed // period))
    return cores


def available_memory() -> int:
    """Bytes this process may use: the machine's memory, cut by the cgroup's limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _read_text(Path(name))
        if limit is not None and limit.isdigit():
            return min(total, int(limit))
    return total


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
