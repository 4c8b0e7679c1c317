"""`http_proxy` and its like: servers elsewhere are reached through the proxy they name, those on this machine are not."""

from __future__ import annotations

from collections.abc import Iterator

import kt_expert_client as kt
import pytest
import torch
from support.batches import LORA, train_step
from support.connect_proxy import ConnectProxy
from support.server import ServerProcess

NAME = "experts.company.test:7443"
VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")


@pytest.fixture
def proxy(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectProxy]:
    for name in (*VARIABLES, "no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ConnectProxy(server.address, NAME) as started:
        yield started


def train(address: str) -> torch.Tensor:
    with kt.connect(address, timeout_s=30.0) as client:
        return train_step(client.open_run(lora=LORA, wire_dtype="fp32"), 1)


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_server_elsewhere_is_reached_through_it(
    server: ServerProcess, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    expected = train(server.address)
    monkeypatch.setenv(variable, proxy.url)
    assert torch.equal(train(NAME), expected)
    assert proxy.asked
    assert set(proxy.asked) == {f"CONNECT {NAME}"}


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_server_on_this_machine_is_not(
    server: ServerProcess, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    train(server.address)
    train(server.address.replace("127.0.0.1", "localhost"))
    assert not proxy.asked


def test_a_proxy_that_refuses_is_named(proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    with pytest.raises(kt.ServerUnavailable) as caught:
        kt.connect("127.0.0.1.company.test:7443", timeout_s=60.0)
    assert f"go through the proxy that http_proxy names ({proxy.url})" in str(caught.value)
    assert "set no_proxy=127.0.0.1.company.test" in str(caught.value)


def test_no_proxy_is_honoured(server: ServerProcess, proxy: ConnectProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy.url)
    monkeypatch.setenv("no_proxy", ".company.test")
    with pytest.raises(kt.ServerUnavailable, match="is not known"):
        kt.connect(NAME, timeout_s=20.0)
    assert not proxy.asked
