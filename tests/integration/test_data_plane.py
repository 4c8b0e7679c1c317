"""A trainer on another host: frames over the server's data port, with TLS and without, and what is done where there is none."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
import trustme
from kt_expert_client import Credentials
from support.batches import LORA, batch, one_pass, opened, train_step
from support.server import ServerProcess
from support.sockets import free_port
from support.tokens import token_of, write_tokens
from support.waiting import wait_until

LARGE = 65536  # tokens; hidden states of 8 MiB in fp32, in eight pieces
DATA = ("--data-listen", "127.0.0.1:0")
NOT_SHARED = ("--same-host", "off")


@dataclass(frozen=True)
class Authority:
    """Who signs certificates, and where the files lie."""

    directory: Path
    made: trustme.CA

    @classmethod
    def create(cls, directory: Path) -> Authority:
        directory.mkdir(exist_ok=True)
        made = trustme.CA()
        made.cert_pem.write_to_path(directory / "ca")
        return cls(directory, made)

    @property
    def ca(self) -> Path:
        return self.directory / "ca"

    def issue(self, name: str = "server", host: str = "127.0.0.1") -> tuple[Path, Path]:
        issued = self.made.issue_cert("localhost", host)
        certificate, key = self.directory / f"{name}.cert", self.directory / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return certificate, key

    def options(self, name: str = "server") -> tuple[str, ...]:
        certificate, key = self.issue(name)
        return "--tls-cert", str(certificate), "--tls-key", str(key)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def secured(qwen3_checkpoint: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("secured") / "log"
    with ServerProcess(qwen3_checkpoint, log, *DATA, *NOT_SHARED, *authority.options()) as process:
        yield process


@pytest.mark.parametrize("tokens", [0, 1, 257, 4096, LARGE])
def test_it_gives_the_bits_of_the_stream(
    server: ServerProcess, secured: ServerProcess, authority: Authority, tokens: int
) -> None:
    found = []
    ways = ((server.address, "stream", None), (server.address, "tcp", None))
    for address, transport, shown in (*ways, (f"grpcs://{secured.address}", "tcp", Credentials(ca=authority.ca))):
        with kt.connect(address, transport=transport, credentials=shown) as client:
            found.append(one_pass(opened(client), 1, tokens))
            assert client.transport == transport
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_large_calls_in_both_directions_at_once(
    server: ServerProcess, secured: ServerProcess, authority: Authority, tls: bool
) -> None:
    """Both threads of the client use one connection."""
    address, shown = (f"grpcs://{secured.address}", Credentials(ca=authority.ca)) if tls else (server.address, None)
    with kt.connect(address, transport="tcp", credentials=shown) as client:
        run = opened(client)
        batches = [batch(LARGE, seed) for seed in range(8)]
        expected = [run.submit_forward(0, *each, save_for_backward=False).result().clone() for each in batches]
        sent = [run.submit_forward(0, *each, save_for_backward=False) for each in batches]
        assert all(torch.equal(each.result(), value) for each, value in zip(sent, expected, strict=True))


def test_it_comes_before_the_stream_and_after_shared_memory(
    qwen3_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        ServerProcess(qwen3_checkpoint, tmp_path / "log", *DATA, *NOT_SHARED) as server,
        caplog.at_level(logging.INFO),
        kt.connect(server.address, transport="auto") as client,
    ):
        train_step(opened(client), 1)
        assert client.transport == "tcp"
        assert server.metric('grpc_server_started_total{grpc_method="DataPlane"}') == 1.0
    assert "there is no connection on this host, so tcp is tried: the server was started with --same-host off" in caplog.text


def test_a_server_without_it(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(qwen3_checkpoint, tmp_path / "log") as server, kt.connect(server.address, transport="tcp") as client:
        expected = (
            r"transport is 'tcp', and there is no connection to the server's data port: .* without --data-listen; use 'auto'"
        )
        with pytest.raises(kt.InvalidRequest, match=expected):
            opened(client)


def _elsewhere(qwen3_checkpoint: Path, tmp_path: Path, port: int, *options: str) -> ServerProcess:
    """A server that says its data port is another one."""
    other = ("--data-address", f"127.0.0.1:{port}")
    return ServerProcess(qwen3_checkpoint, tmp_path / "log", *DATA, *other, *NOT_SHARED, *options)


def test_a_port_that_is_not_to_be_reached_is_told(
    qwen3_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with _elsewhere(qwen3_checkpoint, tmp_path, free_port()) as server:
        with caplog.at_level(logging.INFO), kt.connect(server.address, transport="auto") as client:
            train_step(opened(client), 1)
            assert client.transport == "stream"
        assert "so stream is tried: its data port 127.0.0.1:" in caplog.text
        assert "is not to be reached from here: [Errno 111] Connection refused" in caplog.text


def test_somebody_elses_port_gets_neither_secret_nor_trust(
    qwen3_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers as a server would that does not know the secret."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as impostor:

        def answer() -> None:
            connection, _ = impostor.accept()
            with connection:
                heard.append(connection.recv(1024))
                connection.sendall(b"\1" + bytes(64))
                heard.append(connection.recv(1024))

        thread = threading.Thread(target=answer)
        thread.start()
        with _elsewhere(qwen3_checkpoint, tmp_path, impostor.getsockname()[1]) as server:
            with caplog.at_level(logging.INFO), kt.connect(server.address, transport="auto") as client:
                train_step(opened(client), 1)
                assert client.transport == "stream"
            thread.join()
    assert "who listens at its data port is not the server that made the offer" in caplog.text
    assert heard[1:] == [b""]  # nothing after the greeting


def test_a_port_with_another_certificate_is_not_trusted(
    qwen3_checkpoint: Path, tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = Authority.create(tmp_path / "stranger")
    with (
        ServerProcess(qwen3_checkpoint, tmp_path / "other", *DATA, *NOT_SHARED, *stranger.options()) as other,
        _elsewhere(
            qwen3_checkpoint, tmp_path, int(str(other.data_address).rsplit(":", 1)[1]), *authority.options("third")
        ) as server,
        caplog.at_level(logging.INFO),
        kt.connect(f"grpcs://{server.address}", transport="auto", credentials=Credentials(ca=authority.ca)) as client,
    ):
        train_step(opened(client), 1)
        assert client.transport == "stream"
    assert "the certificate of its data port is not trusted: unable to get local issuer certificate" in caplog.text


def test_tokens_and_certificates_of_clients(qwen3_checkpoint: Path, tmp_path: Path, authority: Authority) -> None:
    tokens = write_tokens(tmp_path / "tokens", alice="train")
    options = (*authority.options("guarded"), "--tls-client-ca", str(authority.ca), "--token-file", str(tokens))
    certificate, key = authority.issue("client")
    (tmp_path / "token").write_text(token_of("alice"))
    shown = Credentials(token_file=tmp_path / "token", ca=authority.ca, certificate=certificate, key=key)
    with (
        ServerProcess(qwen3_checkpoint, tmp_path / "log", *DATA, *options) as server,
        kt.connect(f"grpcs://{server.address}", transport="tcp", credentials=shown) as client,
    ):
        train_step(client.open_run("hers", lora=LORA, wire_dtype="fp32", ephemeral=True), 1)
        assert [each.run for each in client.status().runs] == ["hers"]


def test_a_new_certificate_is_taken_without_a_restart(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    old, new = Authority.create(tmp_path / "old"), Authority.create(tmp_path / "new")
    certificate, key = old.issue()
    options = ("--tls-cert", str(certificate), "--tls-key", str(key))
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *DATA, *options) as server:
        for authority in (old, new):
            with kt.connect(f"grpcs://{server.address}", transport="tcp", credentials=Credentials(ca=authority.ca)) as client:
                train_step(opened(client), 1)
            for made, place in zip(new.issue(), (certificate, key), strict=True):
                made.replace(place)


def test_a_proxy_of_the_environment_is_not_passed_by(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with kt.connect(server.address, transport="tcp") as client:
        monkeypatch.setenv("grpc_proxy", "http://proxy.example:3128")
        monkeypatch.setattr(type(client._transports._address), "is_local", False)
        with pytest.raises(kt.InvalidRequest, match="go through the proxy that grpc_proxy names"):
            opened(client)


def test_grpc_over_a_unix_socket_or_ipv6(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    for options in (
        ("--listen", f"unix:{tmp_path}/kt.sock", "--data-listen", "localhost:0"),
        ("--listen", "[::1]:0", "--data-listen", "[::1]:0"),
    ):
        with (
            ServerProcess(qwen3_checkpoint, tmp_path / "log", *options) as server,
            kt.connect(server.address, transport="tcp") as client,
        ):
            train_step(opened(client), 1)
            assert client.transport == "tcp"


def test_draining_lets_trainers_end(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *DATA) as server:
        with kt.connect(server.address, transport="tcp") as client:
            train_step(opened(client), 1)
            assert server.stop() == 0
        assert "Traceback" not in server.log.read_text()


def test_descriptors_are_given_back(server: ServerProcess) -> None:
    def descriptors() -> int:
        return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

    for _ in range(2):  # the first round opens what stays open
        for _ in range(4):
            with kt.connect(server.address, transport="tcp") as client:
                train_step(opened(client), 1)
        before = descriptors()
    for _ in range(6):
        with kt.connect(server.address, transport="tcp") as client:
            train_step(opened(client), 1)
    wait_until(lambda: descriptors() <= before, 10.0)
