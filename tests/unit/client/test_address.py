"""Addresses as users write them; what is wrong is said at once, and each cause has a sentence of its own."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import kt_expert_client as kt
import pytest
from kt_expert_client.address import ServerAddress
from kt_expert_client.credentials import Credentials, open_channel
from support.sockets import connections

GOOD = {
    "host:7443": ("host:7443", "host", False, False),
    "127.0.0.1:1": ("127.0.0.1:1", "127.0.0.1", False, True),
    "[::1]:80": ("[::1]:80", "::1", False, True),
    "localhost:7443": ("localhost:7443", "localhost", False, True),
    "grpc://host:7443": ("host:7443", "host", False, False),
    "grpcs://host:7443": ("host:7443", "host", True, False),
    "unix:/run/kt.sock": ("unix:/run/kt.sock", "", False, True),
}
BAD = {
    "http://host:7443": "begins with http://, and a kt-expert-server speaks gRPC",
    "host:7443/": "ends with a slash; write 'host:7443'",
    "host": "has no port; expected host:port",
    "": "cannot be read",
    "host:0": "cannot be read",
    "host:99999": "cannot be read",
    "::1:80": "cannot be read",
    "unix:relative": "is not unix: with an absolute path",
}


@pytest.mark.parametrize("text", GOOD)
def test_good_addresses(text: str) -> None:
    parsed = ServerAddress.parse(text)
    assert (parsed.target, parsed.host, parsed.secure, parsed.is_local) == GOOD[text]


@pytest.mark.parametrize("text", BAD)
def test_bad_addresses_are_refused_at_once(text: str) -> None:
    with pytest.raises(kt.InvalidRequest) as caught:
        kt.connect(text)
    assert BAD[text] in str(caught.value)


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(
        kt.ServerUnavailable, match=r"the host name 'no-such-host.invalid' of no-such-host.invalid:7443 is not known"
    ):
        kt.connect("no-such-host.invalid:7443", timeout_s=30)


def test_a_refused_port_is_named() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(kt.ServerUnavailable, match=f"nothing listens at {address}: the connection is refused"):
            kt.connect(address, timeout_s=1)


def test_a_socket_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(kt.ServerUnavailable, match=f"there is no socket {tmp_path}/none"):
        kt.connect(f"unix:{tmp_path}/none", timeout_s=30)


def test_something_that_speaks_http_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for connection in connections(listener):
                with connection:
                    connection.recv(1000)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(kt.ServerUnavailable, match="speaks HTTP/1; is it the metrics port"):
            kt.connect(f"127.0.0.1:{listener.getsockname()[1]}", timeout_s=10)


@pytest.mark.usefixtures("no_proxies")
def test_a_proxy_is_named_where_it_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    described = ServerAddress.parse("10.0.0.1:7443").describe_failure("failed")
    assert described.startswith("connections to 10.0.0.1:7443 go through the proxy that http_proxy names")
    assert ServerAddress.parse("127.0.0.1:7443").describe_failure("failed") == "failed"


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"https_proxy": "http://one:1", "http_proxy": "http://two:2"}, "https_proxy"),
        ({"grpc_proxy": "", "http_proxy": "http://two:2"}, None),
        ({"https_proxy": "https://one:1"}, None),
        ({"http_proxy": "http://one:1", "no_grpc_proxy": "", "no_proxy": "10.0.0.1"}, "http_proxy"),
    ],
)
def test_which_variable_counts(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str | None
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ServerAddress.parse("10.0.0.1:7443").proxy_variable == expected


@pytest.mark.usefixtures("no_proxies")
def test_a_proxys_password_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy:3128")
    described = ServerAddress.parse("10.0.0.1:7443").describe_failure("failed")
    assert "(http://proxy:3128)" in described
    assert "secret" not in described


@pytest.mark.usefixtures("no_proxies")
@pytest.mark.parametrize(
    ("exceptions", "address", "goes_through"),
    [
        ("", "gpu.company.test:7443", True),
        (".company.test", "gpu.company.test:7443", False),
        ("other.test, gpu.company.test", "gpu.company.test:7443", False),
        ("10.0.0.0/8", "10.1.2.3:7443", False),
        ("10.0.0.0/8", "11.1.2.3:7443", True),
        ("10.0.0.0/8", "gpu.company.test:7443", True),
        ("fd00::/8", "[fd00::2]:7443", False),
        (".Company.Test", "gpu.company.test:7443", False),
        (".2.3", "10.1.2.3:7443", False),
    ],
)
def test_exceptions_of_a_proxy(
    monkeypatch: pytest.MonkeyPatch, exceptions: str, address: str, *, goes_through: bool
) -> None:  # fmt: skip
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", exceptions)
    assert (ServerAddress.parse(address).proxy_variable == "http_proxy") is goes_through


def test_an_unknown_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_EXPERT_DROPOT", "0.1")
    with pytest.raises(
        kt.InvalidRequest, match="KT_EXPERT_DROPOT, which kt-expert does not know; did you mean KT_EXPERT_DROPOUT"
    ):
        kt.connect("127.0.0.1:1")


def test_a_token_does_not_travel_in_the_clear(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret-secret-secret\n")
    with pytest.raises(kt.InvalidRequest, match="a token would travel to host:7443 in the clear; write grpcs://host:7443"):
        kt.connect("host:7443", credentials=Credentials(token_file=token))
    channel, metadata = open_channel(ServerAddress.parse("127.0.0.1:7443"), Credentials(token_file=token))
    assert metadata == (("authorization", "Bearer secret-secret-secret"),)
    channel.close()


def test_certificates_without_tls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(kt.InvalidRequest, match="which is without TLS; write grpcs://host:7443"):
        kt.connect("host:7443", credentials=Credentials(ca=tmp_path / "ca"))
    with pytest.raises(kt.InvalidRequest, match="cannot be read: No such file"):
        kt.connect("grpcs://host:7443", credentials=Credentials(ca=tmp_path / "ca"))
    with pytest.raises(kt.InvalidRequest, match="belong together"):
        kt.connect("grpcs://host:7443", credentials=Credentials(certificate=tmp_path / "ca"))
