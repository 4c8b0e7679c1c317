"""What `kt-expert bench transport` measures, with two sizes of message."""

from __future__ import annotations

from pathlib import Path

from kt_expert_server.bench.transport import measure_transport, plot_transport, print_transport, transport_as_json
from rich.console import Console

SMALL, LARGE = 8 * 1024, 32 * 1024 * 1024


def test_every_way_there_and_back(tmp_path: Path) -> None:
    found = measure_transport(1, (SMALL, LARGE))
    kinds = {kind for kind, _ in found.rounds}
    assert kinds == {"raw tcp", "raw unix", "memcpy", "iceoryx2", "stream", "tcp", "same-host", "same-host, spinning"}
    report = transport_as_json(found)
    assert {
        "stream_32mib_vs_tcp", "stream_cpu_s_per_gib", "tcp_cpu_s_per_gib", "shm_32mib_vs_tcp", "shm_32mib_ms",
        "stream_8kib_ms", "doorbell_8kib_ms", "doorbell_spin_8kib_ms", "iceoryx2_8kib_ms",
        "data_plane_32mib_vs_tcp", "data_plane_cpu_s_per_gib", "data_plane_8kib_ms",
    } <= report.keys()  # fmt: skip
    assert all(value > 0 for name, value in report.items() if name != "ms")
    console = Console(record=True, width=200)
    print_transport(console, found)
    assert "iceoryx2" in console.export_text()
    plot_transport(found, tmp_path / "transport.svg")
    assert (tmp_path / "transport.svg").stat().st_size > 0
