"""Names that clients choose, and addresses that operators do."""

from __future__ import annotations

import pytest
from kt_expert_server.checkpoints.names import automatic_name
from kt_expert_server.config import Address
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.names import check_name


@pytest.mark.parametrize("name", ["a", "run-1", "A.b_c-d", "0" * 128])
def test_good_names(name: str) -> None:
    assert check_name("run", name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "-a", "a b", "a\n", "ä", "0" * 129])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not allowed"):
        check_name("run", name)


def test_automatic_checkpoints_have_names_of_their_own() -> None:
    long = ["x" * 128, "x" * 127 + "y"]
    made = {automatic_name(run, sequence) for run in long for sequence in (1, 2)}
    assert len(made) == 4
    assert all(check_name("checkpoint", name) for name in made)


def test_addresses() -> None:
    assert str(Address.parse("127.0.0.1:0")) == "127.0.0.1:0"
    assert Address.parse("[::1]:80") == Address("[::1]", 80)
    for text in ("", "host", ":80", "host:99999", "ho st:1", "host:-1"):
        with pytest.raises(InvalidRequest, match="is not host:port"):
            Address.parse(text)
