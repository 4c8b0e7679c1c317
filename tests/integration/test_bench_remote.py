"""What `kt-expert bench remote` measures, on a layer that takes no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from kt_expert_server.bench.remote import Case, cases, measure_remote, plot_remote, print_remote, remote_as_json
from kt_expert_server.bench.shapes import LayerShape
from rich.console import Console

TINY = LayerShape("tiny", 8, 256, 128, 2)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_remote_call_beside_the_engines_own(in_flight: int) -> None:
    case = Case("tiny", TINY, 16, 1, in_flight=in_flight, calls=3)
    found = measure_remote([case], 2)
    assert [each.transport for each in found] == ["stream", "tcp", "same-host"]
    for each in found:
        assert len(each.local) == len(each.remote) == 2
        assert each.ratio > 1.0
        assert each.extra_forward_s > 0.0


def test_the_report_has_every_case(tmp_path: Path) -> None:
    wanted = [replace(each, shape=TINY, tokens=4, threads=1, calls=2) for each in cases(1)]
    found = measure_remote(wanted, 1)
    report = remote_as_json(found)
    ways = ("stream", "data_plane", "shm")
    kinds = [f"{way}_ratio{cores}{two}" for way in ways for cores in ("", "_all_cores") for two in ("", "_two")]
    beside = [name for way in ways for name in (f"{way}_stall_ms", f"decode_extra_ms_{way}")]
    assert report.keys() == {*kinds, *beside, "decode_extra_ms_shm_spin", "in_process_ms"}
    console = Console(record=True, width=140)
    print_remote(console, found)
    assert "one token" in console.export_text()
    plot_remote(found, tmp_path / "remote.svg")
    assert (tmp_path / "remote.svg").stat().st_size > 0
