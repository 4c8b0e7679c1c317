"""Every case of trainers, on both sides."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ecosystem import adapters, extra_experts, loops, passes, trainers
from ecosystem.case import Case

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, on both sides


@pytest.mark.parametrize("case", [*adapters.CASES, *extra_experts.CASES, *loops.CASES, *passes.CASES, *trainers.CASES], ids=str)
def test_equal_or_refused(case: Case, compare: Callable[[Case], None]) -> None:
    compare(case)
