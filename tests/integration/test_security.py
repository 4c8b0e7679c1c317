"""Who may come in: TLS, tokens and their scopes, sockets of this machine, and refusals at start-up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import kt_expert_client as kt
import pytest
import trustme
from kt_expert_client import Credentials
from kt_expert_proto.v1 import service_pb2 as pb
from support.batches import LORA, train_step
from support.server import ServerProcess

TOKENS = {"alice": "alice-secret-0123456789", "bob": "bob-secret-0123456789", "root": "root-secret-0123456789"}
TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Files:
    directory: Path

    def __getattr__(self, name: str) -> Path:
        return self.directory / name

    def token(self, name: str, text: str = "") -> Path:
        path = self.directory / f"token-{name}"
        path.write_text(text or TOKENS[name])
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    made = Files(tmp_path_factory.mktemp("tls"))
    authority = trustme.CA()
    authority.cert_pem.write_to_path(made.ca)
    _issue(authority, made.cert, made.key)
    _issue(authority, made.client_cert, made.client_key)
    made.tokens.write_text(
        f"# identity scopes token\nalice train {TOKENS['alice']}\nbob train {TOKENS['bob']}\nroot admin {TOKENS['root']}\n"
    )
    made.tokens.chmod(0o600)
    return made


def _issue(authority: trustme.CA, certificate: Path, key: Path) -> None:
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)


@pytest.fixture(scope="module")
def secured(qwen3_checkpoint: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("secured")
    arguments = ["--tls-cert", files.cert, "--tls-key", files.key, "--token-file", files.tokens, "--state-dir", directory / "s"]
    with ServerProcess(qwen3_checkpoint, directory / "log", *map(str, arguments)) as process:
        yield process


def as_(files: Files, name: str) -> Credentials:
    return Credentials(token_file=files.token(name), ca=files.ca)


def test_a_token_over_tls_trains(secured: ServerProcess, files: Files) -> None:
    with kt.connect(f"grpcs://{secured.address}", credentials=as_(files, "alice")) as client:
        train_step(client.open_run(lora=LORA, wire_dtype="fp32"), 0)


def test_strangers_are_turned_away(secured: ServerProcess, files: Files) -> None:
    address = f"grpcs://{secured.address}"
    with pytest.raises(kt.NotAuthenticated, match="asks for a token; set KT_EXPERT_TOKEN_FILE"):
        kt.connect(address, credentials=Credentials(ca=files.ca))
    with pytest.raises(kt.NotAuthenticated, match="does not know the token"):
        kt.connect(address, credentials=Credentials(token_file=files.token("x", "x" * 20), ca=files.ca))
    with pytest.raises(kt.NotPermitted, match=r"the scopes \['admin'\], this needs 'train'"):
        kt.connect(address, credentials=as_(files, "root"))
    with pytest.raises(kt.ServerUnavailable):  # it does not trust the certificate
        kt.connect(address, credentials=Credentials(token_file=files.token("alice")), timeout_s=2)
    with pytest.raises(kt.ServerUnavailable):  # without TLS there is no answer at all
        kt.connect(secured.address, credentials=Credentials(token_file=files.token("alice")), timeout_s=2)


def test_runs_belong_to_who_opened_them(secured: ServerProcess, files: Files) -> None:
    address = f"grpcs://{secured.address}"
    with (
        kt.connect(address, credentials=as_(files, "alice")) as alice,
        kt.connect(address, credentials=as_(files, "bob")) as bob,
    ):
        run = alice.open_run("hers", lora=LORA, wire_dtype="fp32", ephemeral=True)
        run.save_checkpoint("her-checkpoint")
        for attempt in (
            lambda: bob.open_run("hers", lora=LORA, wire_dtype="fp32"),
            lambda: bob.open_run("hers", lora=LORA, wire_dtype="fp32", takeover=True),
            lambda: bob.close_run("hers"),
        ):
            with pytest.raises(kt.NotPermitted, match="run 'hers' belongs to another identity"):
                attempt()
        assert [each.run for each in bob.status().runs] == []
        own = bob.open_run("his", lora=LORA, wire_dtype="fp32", ephemeral=True)
        with pytest.raises(kt.NotPermitted, match="checkpoint 'her-checkpoint' belongs to another identity"):
            own.load_checkpoint("her-checkpoint")
        assert not bob._stub.ListCheckpoints(pb.ListCheckpointsRequest(), metadata=bob._metadata).checkpoints
        train_step(run, 0)


def test_only_admins_drain(secured: ServerProcess, files: Files) -> None:
    with kt.connect(f"grpcs://{secured.address}", credentials=as_(files, "alice")) as alice:
        with pytest.raises(grpc.RpcError) as caught:
            alice._stub.Drain(pb.DrainRequest(), timeout=TIMEOUT_S, metadata=alice._metadata)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_clients_may_have_to_show_a_certificate(qwen3_checkpoint: Path, files: Files, tmp_path: Path) -> None:
    arguments = ["--tls-cert", files.cert, "--tls-key", files.key, "--tls-client-ca", files.ca]
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *map(str, arguments)) as process:
        address = f"grpcs://{process.address}"
        with pytest.raises(kt.ServerUnavailable):
            kt.connect(address, credentials=Credentials(ca=files.ca), timeout_s=2)
        shown = Credentials(ca=files.ca, certificate=files.client_cert, key=files.client_key)
        with kt.connect(address, credentials=shown) as client:
            train_step(client.open_run(lora=LORA, wire_dtype="fp32"), 0)


def test_a_new_certificate_is_taken_without_a_restart(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    for name, authority in (("old", old), ("new", new)):
        authority.cert_pem.write_to_path(tmp_path / name)
    cert, key = tmp_path / "cert", tmp_path / "key"
    _issue(old, cert, key)
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", "--tls-cert", str(cert), "--tls-key", str(key)) as process:
        address = f"grpcs://{process.address}"
        kt.connect(address, credentials=Credentials(ca=tmp_path / "old")).close()
        _issue(new, cert, key)
        kt.connect(address, credentials=Credentials(ca=tmp_path / "new")).close()


def test_unix_sockets_and_ipv6(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    socket = tmp_path / "kt.sock"
    arguments = ["--listen", f"unix:{socket}", "--metrics-listen", "[::1]:0"]
    for _ in range(2):  # the second finds the socket of the first
        with ServerProcess(qwen3_checkpoint, tmp_path / "log", *arguments) as process, kt.connect(process.address) as client:
            assert process.address == f"unix:{socket}"
            assert socket.stat().st_mode & 0o777 == 0o600
            train_step(client.open_run(lora=LORA, wire_dtype="fp32"), 0)
            assert process.get("/livez")[0] == 200
    with (
        ServerProcess(qwen3_checkpoint, tmp_path / "log", "--listen", "[::1]:0") as process,
        kt.connect(process.address) as client,
    ):
        train_step(client.open_run(lora=LORA, wire_dtype="fp32"), 0)


def refused(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "kt_expert_server", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in result.stderr
    return result.returncode, result.stderr


def test_what_would_be_unsafe_does_not_start(
    server: ServerProcess, qwen3_checkpoint: Path, files: Files, tmp_path: Path
) -> None:
    model = ["--model", str(qwen3_checkpoint), "--metrics-listen", "127.0.0.1:0"]
    readable = tmp_path / "readable"
    readable.write_text(files.tokens.read_text())
    readable.chmod(0o644)
    wrong = tmp_path / "wrong"
    wrong.write_text("alice everything 0123456789abcdef\n")
    wrong.chmod(0o600)
    port = server.address.rsplit(":", 1)[1]
    cases = [
        (["--listen", "0.0.0.0:0"], 2, "can be reached from other machines; give --tls-cert, --tls-key and --token-file"),
        (["--listen", "0.0.0.0:0", "--token-file", str(files.tokens)], 2, "tokens would travel in the clear"),
        (["--listen", "0.0.0.0:0", "--tls-cert", str(files.cert), "--tls-key", str(files.key)], 2, "--token-file, or say"),
        (["--listen", "127.0.0.1:0", "--tls-cert", str(files.cert)], 2, "belong together"),
        (["--listen", "127.0.0.1:0", "--tls-cert", "none", "--tls-key", "none"], 2, "TLS file none cannot be read"),
        (["--listen", "127.0.0.1:0", "--token-file", str(readable)], 2, "can be read or changed by others; chmod 600"),
        (["--listen", "127.0.0.1:0", "--token-file", str(wrong)], 2, "names the scopes ['everything']"),
        (["--listen", "127.0.0.1:0", "--checkpoint-every", "5"], 2, "needs a place for checkpoints; give --state-dir"),
        (["--listen", "127.0.0.1:0", "--checkpoint-every", "often"], 2, "expected a number of steps (10) or of seconds (300s)"),
        (["--listen", f"localhost:{port}"], 11, "the port is in use"),
        (["--listen", "203.0.113.7:0", "--insecure-allow-remote"], 11, "no interface of this machine has that address"),
        (["--listen", "no-such-host.invalid:1", "--insecure-allow-remote"], 11, "the host name is not known"),
        (["--listen", f"unix:{readable}"], 11, "there is a file of that name that is no socket"),
        (["--listen", f"unix:{tmp_path}/none/kt.sock"], 11, "there is no directory"),
        (["--listen", "127.0.0.1:0", "--spin", "51"], 2, "--spin is 51, expected microseconds from 0 to 50"),
        (["--listen", "127.0.0.1:0", "--data-listen", "0.0.0.0:0"], 2, "--data-listen 0.0.0.0:0 can be reached from other"),
        (["--listen", "127.0.0.1:0", "--data-listen", "unix:/tmp/x"], 2, "--data-listen is unix:/tmp/x, expected HOST:PORT"),
        (["--listen", "127.0.0.1:0", "--data-address", "a:1"], 2, "says where --data-listen is reached; give that, too"),
        (["--listen", "127.0.0.1:0", "--data-listen", "127.0.0.1:0", "--data-address", "a:0"], 2, "the port that trainers"),
        (["--listen", "127.0.0.1:0", "--data-listen", f"127.0.0.1:{port}"], 11, "cannot listen for data on"),
    ]
    for arguments, status, text in cases:
        got, stderr = refused(*model, *arguments)
        assert (got, text in stderr) == (status, True), (arguments, stderr[-400:])
