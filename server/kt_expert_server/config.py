"""Configuration of one server process: validated once, here, then trusted."""

from __future__ import annotations

import math
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import kt_expert_native as native
from kt_expert_proto.fast_path import MOST_SPIN_US

from kt_expert_server.cgroups import cpu_limit, memory_limit
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.members.limits import Limits
from kt_expert_server.model.loader import AUTO_FORMAT
from kt_expert_server.model.placement import Placement

DEFAULT_LISTEN = "127.0.0.1:7443"
DEFAULT_METRICS_LISTEN = "127.0.0.1:9464"
WEIGHT_FORMATS = tuple(native.list_weight_formats())
SERVED_FORMATS = (AUTO_FORMAT, *WEIGHT_FORMATS)
DEFAULT_LIMITS = Limits()
# A trainer makes two when it begins, some while the server loads, and one for each time it connects again. A stream that opens
# a run costs 5 ms of a core.
DEFAULT_CALLS_PER_SECOND = 10.0
ISA_VARIABLE = "KT_EXPERT_ISA"  # forces an instruction set
_ADDRESS = re.compile(r"^(?P<host>[^:\s]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})$")
_MAX_PORT = 65535
_US_PER_S = 1_000_000


@dataclass(frozen=True, slots=True)
class Address:
    """host:port, where port 0 takes a free one, or the path of a unix socket."""

    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises InvalidRequest for anything but host:port, [IPv6]:port and unix:/path."""
        if text.startswith("unix:/"):
            return cls("", 0, text.removeprefix("unix:"))
        match = _ADDRESS.match(text)
        if match is None or int(match["port"]) > _MAX_PORT:
            raise InvalidRequest(f"address {text!r} is not host:port with a port up to {_MAX_PORT}, [IPv6]:port or unix:/path")
        return cls(match["host"], int(match["port"]))

    @property
    def bare_host(self) -> str:
        """Without the brackets of an IPv6 address."""
        return self.host.strip("[]")

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Security:
    """What protects the gRPC port. Nothing of it is needed on loopback."""

    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None  # clients must then show a certificate it has signed
    token_file: Path | None = None
    allow_remote: bool = False
    reflection: bool = False  # outside loopback too

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise InvalidRequest("--tls-cert and --tls-key belong together; give both")
        if self.client_ca is not None and self.certificate is None:
            raise InvalidRequest("--tls-client-ca needs --tls-cert and --tls-key")


NO_SECURITY = Security()


@dataclass(frozen=True, slots=True)
class SameHostPlace:
    """The directory whose socket trainers on this host come to. `is_wanted`: it was asked for by name, so it has to work."""

    directory: Path
    is_wanted: bool
    spin_s: float = 0.0  # that the server looks for a small forward before it sleeps

    @classmethod
    def parse(cls, text: str, spin_us: int = 0) -> SameHostPlace | None:
        """DIR, `auto` for one of the user's own, or `off`. Raises InvalidRequest for a relative path, or too long a spin."""
        if not 0 <= spin_us <= MOST_SPIN_US:
            raise InvalidRequest(f"--spin is {spin_us}, expected microseconds from 0 to {MOST_SPIN_US}")
        spin_s = spin_us / _US_PER_S
        if text == "off":
            return None
        if text == "auto":
            runtime = os.environ.get("XDG_RUNTIME_DIR", "")
            own = Path(runtime) / "kt-expert" if runtime else Path(tempfile.gettempdir()) / f"kt-expert-{os.geteuid()}"
            return cls(own, is_wanted=False, spin_s=spin_s)
        if not Path(text).is_absolute():
            raise InvalidRequest(f"--same-host is {text!r}, expected an absolute path, auto or off")
        return cls(Path(text), is_wanted=True, spin_s=spin_s)


@dataclass(frozen=True, slots=True)
class DataPlanePlace:
    """The port for frames beside gRPC, and where trainers reach it, if elsewhere."""

    address: Address
    reached_at: Address | None

    @classmethod
    def parse(cls, text: str, reached_at: str | None) -> DataPlanePlace | None:
        """HOST:PORT or `off`. Raises InvalidRequest."""
        if text == "off":
            if reached_at is not None:
                raise InvalidRequest(f"--data-address {reached_at} says where --data-listen is reached; give that, too")
            return None
        addresses = [Address.parse(each) for each in (text, reached_at) if each is not None]
        for option, address in zip(("--data-listen", "--data-address"), addresses, strict=False):
            if address.path:
                raise InvalidRequest(f"{option} is {address}, expected HOST:PORT: it is for trainers on other hosts")
        if reached_at is not None and not addresses[1].port:
            raise InvalidRequest(f"--data-address is {reached_at}, expected the port that trainers connect to")
        return cls(addresses[0], addresses[1] if reached_at is not None else None)


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
    limits: Limits = DEFAULT_LIMITS
    security: Security = NO_SECURITY
    calls_per_second: float = DEFAULT_CALLS_PER_SECOND  # of one identity: streams opened, control calls, refused requests
    same_host: SameHostPlace | None = None  # None: trainers on this host come through gRPC, too
    data_plane: DataPlanePlace | None = None  # None: trainers on other hosts come through gRPC

    def __post_init__(self) -> None:
        if self.weight_format not in SERVED_FORMATS:
            raise InvalidRequest(
                f"weight format {self.weight_format!r} is not available; choose one of: {', '.join(SERVED_FORMATS)}"
            )
        if self.threads < 1:
            raise InvalidRequest(f"threads is {self.threads}, expected at least 1")
        if not (math.isfinite(self.calls_per_second) and self.calls_per_second > 0):
            raise InvalidRequest(f"--calls-per-second is {self.calls_per_second}, expected a number above 0")


def available_cores() -> int:
    """Cores this process may run on: its affinity, cut by the CPU quota of its control group."""
    cores, quota = len(os.sched_getaffinity(0)), cpu_limit()
    return cores if quota is None else max(1, min(cores, int(quota)))


def available_memory() -> int:
    """Bytes this process may use: the machine's memory, cut by the limit of its control group."""
    total, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), memory_limit()
    return total if limit is None else min(total, limit)
