"""A token that others on the network could read: neither side lets it come to that."""

from __future__ import annotations

from pathlib import Path

import kt_expert_client as kt
import pytest
from kt_expert_client import Credentials
from support.connect_proxy import ConnectProxy
from support.server import ServerProcess
from support.tokens import token_of, write_tokens

ELSEWHERE = "experts.company.test:7443"


def test_a_server_that_would_take_one_does_not_start(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", alice="train")
    options = ("--listen", "0.0.0.0:0", "--token-file", str(tokens))
    for more in ((), ("--insecure-allow-remote",)):
        with pytest.raises(AssertionError, match=r"(?s)the server ended with 2: .*tokens would travel in the clear"):
            ServerProcess(qwen3_checkpoint, tmp_path / "log", *options, *more)


@pytest.mark.parametrize("address", [ELSEWHERE, f"grpc://{ELSEWHERE}", "10.0.0.1:7443", "[fd00::2]:7443"])
def test_a_client_does_not_send_it(
    guarded_server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    token = tmp_path / "token"
    token.write_text(token_of("alice"))
    with ConnectProxy(guarded_server.address, ELSEWHERE) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("KT_EXPERT_TOKEN_FILE", str(token))
        with pytest.raises(kt.InvalidRequest, match=r"a token would travel to .* in the clear; write grpcs://"):
            kt.connect(address, timeout_s=5.0)
        with pytest.raises(kt.InvalidRequest, match="in the clear"):
            kt.connect(address, timeout_s=5.0, credentials=Credentials(token_file=token))
        assert not proxy.asked
