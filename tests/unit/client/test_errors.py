"""Errors travel: between threads, and between the processes of a data loader or a launcher."""

from __future__ import annotations

import copy
import pickle

import pytest
from kt_expert_client.errors import KtExpertError, OutOfCapacity, RunStateLost

ERRORS = (
    RunStateLost("go on from step 4", step=4),
    OutOfCapacity("full", retry_delay_s=2.5, is_answer=True),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("copied", [
    copy.copy,
    copy.deepcopy,
    lambda error: pickle.loads(pickle.dumps(error)),  # noqa: S301  # its own
])  # fmt: skip
def test_an_error_can_be_copied_and_pickled(error: KtExpertError, copied: object) -> None:
    other = copied(error)  # type: ignore[operator]
    assert type(other) is type(error)
    assert str(other) == str(error)
    assert vars(other) == vars(error)
