"""What it costs to carry a tensor to the server and another one back, beside raw sockets and a copy in memory.

The engine's part is taken out: a forward whose routes are all skipped (expert id E) computes nothing, and what it takes in
process is subtracted. Raw sockets carry as many bytes each way between two processes, received where they stay. Where iceoryx2
is installed, it passes messages of that size in shared memory, which nobody writes or reads.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kt_expert_native as native
import numpy as np
from rich.console import Console
from rich.table import Table

from kt_expert_server.bench import iceoryx
from kt_expert_server.bench.echo import LENGTH_BYTES
from kt_expert_server.bench.layer import LayerBench
from kt_expert_server.bench.plots import figure_for
from kt_expert_server.bench.processes import Process, cpu_s_of
from kt_expert_server.bench.remote import SPINNING, TRANSPORTS, trainer_for, write_model
from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.engine.passes import TILE_TOKENS
from kt_expert_server.errors import InvalidRequest

RAW_TCP, RAW_UNIX = "raw tcp", "raw unix"
RAW = (RAW_TCP, RAW_UNIX, "memcpy")
_ICEORYX = "iceoryx2"
_HIDDEN, _TOP_K, _EXPERTS = 4096, 2, 8
_SHAPE = LayerShape("echo", _EXPERTS, _HIDDEN, 64, _TOP_K)
_BF16_BYTES = 2
_SIZES = (8 * 1024, 1024 * 1024, 8 * 1024 * 1024, 32 * 1024 * 1024)
_SMALL, _LARGE = _SIZES[0], _SIZES[-1]
_LEAST_ROUND_S = 0.05  # so that small messages are timed in hundreds
_MOST_IN_ROUND = 200
_GIB = 1024**3
_MS_PER_S = 1000.0


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of a message there and back, and processor seconds of both ends."""

    seconds: float
    cpu_s: float


@dataclass(slots=True)
class Figures:
    """By what carries and how many bytes: rounds."""

    rounds: dict[tuple[str, int], list[Round]]

    def seconds(self, kind: str, size: int) -> float:
        return statistics.median(each.seconds for each in self.rounds[kind, size])

    def cpu_s_per_gib(self, kind: str, size: int) -> float:
        """Of bytes carried, both ways together."""
        return statistics.median(each.cpu_s for each in self.rounds[kind, size]) / (2 * size / _GIB)

    def ratio(self, kind: str, other: str, size: int) -> float:
        """Of neighbouring rounds."""
        pairs = zip(self.rounds[kind, size], self.rounds[other, size], strict=True)
        return statistics.median(mine.seconds / theirs.seconds for mine, theirs in pairs)


def measure_transport(repeats: int, sizes: tuple[int, ...] = _SIZES) -> Figures:
    """Interleaved rounds of everything."""
    engine = native.Engine(1, "")
    local = LayerBench(engine, _SHAPE, "bf16")
    kinds = (*RAW, *((_ICEORYX,) if iceoryx.is_installed() else ()), *TRANSPORTS)
    found: dict[tuple[str, int], list[Round]] = {(kind, size): [] for kind in kinds for size in sizes}
    found |= {(SPINNING, _SMALL): []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        write_model(Path(folder) / "model", _SHAPE)
        trainers = {
            each: stack.enter_context(trainer_for(each, Path(folder) / "model", 1, rank=0)) for each in (*TRANSPORTS, SPINNING)
        }
        raw = {kind: stack.enter_context(_echo(kind, Path(folder))) for kind in (RAW_TCP, RAW_UNIX)}
        shared = {}
        if _ICEORYX in kinds:
            name = f"kt-expert-bench-{os.getpid()}"
            shared = {size: stack.enter_context(iceoryx.connection(f"{name}-{size}", size)) for size in sizes}
        for number in range(repeats + 1):  # the first warms up
            for size in sizes:
                took = {kind: _raw_round(*raw[kind], size) for kind in raw}
                took["memcpy"] = _copy_round(size)
                if size in shared:
                    took[_ICEORYX] = _iceoryx_round(*shared[size])
                computing = _compute_s(local, size)
                for transport, (trainer, server) in trainers.items():
                    if transport != SPINNING or size == _SMALL:
                        took[transport] = _round(trainer, server, size, computing)
                if number:
                    for kind, each in took.items():
                        found[kind, size].append(each)
        for trainer, _ in trainers.values():
            trainer.ask(close=True)
    return Figures(found)


def _round(trainer: Process, server: Process, size: int, computing: Round) -> Round:
    before = server.cpu_s()
    took = trainer.ask(echo={"tokens": size // _BF16_BYTES // _HIDDEN, "least_s": _LEAST_ROUND_S, "most": _MOST_IN_ROUND})
    cpu_s = took["cpu_s"] + (server.cpu_s() - before) / took["calls"]
    return Round(max(took["seconds"] - computing.seconds, 1e-9), max(cpu_s - computing.cpu_s, 1e-9))


def _compute_s(local: LayerBench, size: int) -> Round:
    """Of such a forward in process."""
    tokens = size // _BF16_BYTES // _HIDDEN
    x, y = np.zeros((tokens, _HIDDEN), np.uint16), np.zeros((tokens, _HIDDEN), np.uint16)
    ids, weights = np.full((tokens, _TOP_K), _EXPERTS, np.int32), np.zeros((tokens, _TOP_K), np.float32)
    begun_cpu, times = time.process_time(), []
    for _ in range(5):
        begun = time.perf_counter()
        for tile in range(0, tokens, TILE_TOKENS):  # as the server does
            part = slice(tile, tile + TILE_TOKENS)
            local.engine.forward(local.weights, None, x[part], ids[part], weights[part], y[part])
        times.append(time.perf_counter() - begun)
    return Round(statistics.median(times), (time.process_time() - begun_cpu) / len(times))


# Raw sockets


@contextmanager
def _echo(kind: str, folder: Path) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """A connection to a process that sends everything back, and the process."""
    if kind == RAW_TCP:
        listening = socket.create_server(("127.0.0.1", 0))
    else:
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(folder / "echo.sock"))
        listening.listen()
    with listening:
        command = [sys.executable, "-m", "kt_expert_server.bench.echo", str(listening.fileno())]
        process = subprocess.Popen(command, pass_fds=[listening.fileno()])
        connection = socket.socket(listening.family)
        connection.connect(listening.getsockname())
    if kind == RAW_TCP:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        yield connection, process
    finally:
        connection.close()
        process.wait()


def _raw_round(connection: socket.socket, process: subprocess.Popen[bytes], size: int) -> Round:
    content, target = memoryview(bytearray(size)), memoryview(bytearray(size))
    own, other = time.process_time(), cpu_s_of(process.pid)
    times: list[float] = []
    while sum(times) < _LEAST_ROUND_S and len(times) < _MOST_IN_ROUND:
        begun = time.perf_counter()
        connection.sendall(size.to_bytes(LENGTH_BYTES, "little"))
        connection.sendall(content)
        received = 0
        while received < size:
            received += connection.recv_into(target[received:])
        times.append(time.perf_counter() - begun)
    cpu_s = time.process_time() - own + cpu_s_of(process.pid) - other
    return Round(statistics.median(times), cpu_s / len(times))


def _iceoryx_round(ends: iceoryx.Ends, other: Process) -> Round:
    own, theirs = time.process_time(), other.cpu_s()
    times: list[float] = []
    while sum(times) < _LEAST_ROUND_S and len(times) < _MOST_IN_ROUND:
        begun = time.perf_counter()
        ends.send()
        if not ends.receive():
            raise InvalidRequest("iceoryx2 lost a message of the benchmark")
        times.append(time.perf_counter() - begun)
    cpu_s = time.process_time() - own + other.cpu_s() - theirs
    return Round(statistics.median(times), cpu_s / len(times))


def _copy_round(size: int) -> Round:
    source, target = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    own, times = time.process_time(), []
    for _ in range(10):
        begun = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begun)
    return Round(2 * statistics.median(times), 2 * (time.process_time() - own) / len(times))


def transport_as_json(found: Figures) -> dict[str, Any]:
    """The figures under the names that dashboards of this benchmark have."""
    anchor = {}
    if (_ICEORYX, _SMALL) in found.rounds:
        anchor["iceoryx2_8kib_ms"] = found.seconds(_ICEORYX, _SMALL) * _MS_PER_S
    return anchor | {
        "stream_32mib_vs_tcp": found.ratio("stream", RAW_TCP, _LARGE),
        "stream_cpu_s_per_gib": found.cpu_s_per_gib("stream", _LARGE),
        "tcp_cpu_s_per_gib": found.cpu_s_per_gib(RAW_TCP, _LARGE),
        "data_plane_32mib_vs_tcp": found.ratio("tcp", RAW_TCP, _LARGE),
        "data_plane_cpu_s_per_gib": found.cpu_s_per_gib("tcp", _LARGE),
        "data_plane_8kib_ms": found.seconds("tcp", _SMALL) * _MS_PER_S,
        "shm_cpu_s_per_gib": found.cpu_s_per_gib("same-host", _LARGE),
        "shm_32mib_vs_tcp": found.ratio("same-host", RAW_TCP, _LARGE),
        "shm_32mib_ms": found.seconds("same-host", _LARGE) * _MS_PER_S,
        "stream_8kib_ms": found.seconds("stream", _SMALL) * _MS_PER_S,
        "doorbell_8kib_ms": found.seconds("same-host", _SMALL) * _MS_PER_S,
        "doorbell_spin_8kib_ms": found.seconds(SPINNING, _SMALL) * _MS_PER_S,
        "ms": {f"{kind}, {size} bytes": found.seconds(kind, size) * _MS_PER_S for kind, size in found.rounds},
    }


def print_transport(console: Console, found: Figures) -> None:
    kinds = list(dict.fromkeys(kind for kind, _ in found.rounds))
    table = Table(title="there and back, ms (and processor seconds a GiB of both ends)", title_justify="left")
    for name in ("KiB", *kinds):
        table.add_column(name, justify="right")
    for size in dict.fromkeys(size for _, size in found.rounds):
        table.add_row(str(size // 1024), *(_shown(found, kind, size) for kind in kinds))
    console.print(table)


def _shown(found: Figures, kind: str, size: int) -> str:
    if (kind, size) not in found.rounds:
        return ""
    return f"{found.seconds(kind, size) * _MS_PER_S:.3f} ({found.cpu_s_per_gib(kind, size):.2f})"


def plot_transport(found: Figures, path: Path) -> None:
    """Milliseconds over the size, a line for each way. Needs matplotlib."""
    with figure_for(path) as axis:
        for kind in dict.fromkeys(kind for kind, _ in found.rounds):
            sizes = [size for each, size in found.rounds if each == kind]
            axis.plot(sizes, [found.seconds(kind, size) * _MS_PER_S for size in sizes], marker="o", label=kind)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("bytes each way")
        axis.set_ylabel("ms there and back")
