"""Which memory nodes the server chooses."""

from __future__ import annotations

import pytest
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.placement import Placement, choose_placement

TWO = [(0, [0, 1]), (2, [2, 3])]


@pytest.mark.parametrize(
    ("asked", "threads", "machine", "expected"),
    [
        ("auto", 4, TWO, Placement(2, (0, 2))),
        ("auto", 1, TWO, Placement(remark="the machine has 2, more than the 1 threads")),
        ("auto", 4, TWO[:1], Placement()),
        ("1", 4, TWO, Placement()),
        ("2", 4, TWO, Placement(2, (0, 2))),
        ("3", 4, TWO, Placement(3)),
        ("2", 4, TWO[:1], Placement(2)),
    ],
)
def test_choices(asked: str, threads: int, machine: list[tuple[int, list[int]]], expected: Placement) -> None:
    assert choose_placement(asked, threads, machine) == expected


@pytest.mark.parametrize("asked", ["0", "-1", "two", "", "²", "65", "9" * 30])
def test_what_is_no_number_of_nodes_is_refused(asked: str) -> None:
    with pytest.raises(InvalidRequest, match="--nodes is"):
        choose_placement(asked, 4, TWO)


def test_descriptions() -> None:
    assert Placement(2, (0, 2)).describe() == "split over memory nodes 0, 2, threads near them"
    assert "cut into 3 slices" in Placement(3).describe()
    assert Placement().describe() == "on one memory node"
    assert Placement(remark="why").describe() == "on one memory node (why)"
