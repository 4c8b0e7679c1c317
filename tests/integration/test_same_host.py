"""A trainer on the server's host: memory that both see, and what is done where there can be none."""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import kt_expert_client as kt
import kt_expert_native as native
import pytest
import torch
from kt_expert_client.run import Run
from kt_expert_client.wire.shared_memory import SharedMemory
from kt_expert_client.wire.socket_transport import SocketTransport
from kt_expert_proto.v1 import service_pb2 as pb
from support.batches import batch, one_pass, opened
from support.server import ServerProcess
from support.waiting import wait_until

TOKENS = 2048  # hidden states of 256 KiB in fp32
LARGE = 16384  # of 2 MiB
SMALL_MEMORY = ("--memory-limit", "0.75")  # GiB: regions of 24 MiB


@pytest.fixture
def small_server(qwen3_checkpoint: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *SMALL_MEMORY) as server:
        yield server


def _transport(run: Run) -> SocketTransport:
    link = run._session._link
    assert link is not None
    assert isinstance(link.transport, SocketTransport)
    return link.transport


def _memory(run: Run) -> SharedMemory:
    memory = _transport(run)._memory
    assert memory is not None
    return memory


@pytest.mark.parametrize("tokens", [0, 1, 255, 256, 257, TOKENS, LARGE])
def test_all_transports_give_the_same_bits(server: ServerProcess, tokens: int) -> None:
    found = {}
    for transport in ("stream", "same-host"):
        with kt.connect(server.address, transport=transport) as client:
            found[transport] = one_pass(opened(client), 1, tokens)
            assert client.transport == transport
    assert all(torch.equal(*pair) for pair in zip(*found.values(), strict=True))


def test_it_is_what_a_trainer_gets_unasked(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KT_EXPERT_TRANSPORT", raising=False)
    with kt.connect(server.address) as client:
        one_pass(opened(client), 1, TOKENS)
        assert client.transport == "same-host"


def test_tensors_are_where_the_server_put_them_until_nobody_has_them(server: ServerProcess) -> None:
    with kt.connect(server.address, transport="same-host") as client:
        run = opened(client)
        first = one_pass(run, 1, TOKENS)
        copies = [each.clone() for each in first]
        held = _memory(run)._borrower.held_places
        assert held == 2  # output and gradient; the routing weights' was sent
        first[0].add_(1.0)
        for seed in range(2, 6):
            one_pass(run, seed, TOKENS)
        assert torch.equal(first[0], copies[0] + 1.0)
        assert all(torch.equal(*pair) for pair in zip(first[1:], copies[1:], strict=True))
        del first
        gc.collect()
        one_pass(run, 7, TOKENS)  # takes back along what is free
        assert _memory(run)._borrower.held_places <= 2


def test_where_a_trainer_keeps_everything_tensors_are_sent(small_server: ServerProcess) -> None:
    with kt.connect(small_server.address, transport="stream") as client:
        run = opened(client)
        expected = [one_pass(run, seed, LARGE)[0] for seed in range(16)]
    with kt.connect(small_server.address, transport="same-host") as client:
        run = opened(client)
        kept = [one_pass(run, seed, LARGE)[0] for seed in range(16)]
        assert 0 < _memory(run)._borrower.held_places < 16
    assert all(torch.equal(*pair) for pair in zip(kept, expected, strict=True))


def test_a_batch_for_which_there_is_no_room_now_is_sent(small_server: ServerProcess) -> None:
    """Three of 9 MiB in flight."""
    with kt.connect(small_server.address, transport="same-host") as client:
        run = opened(client)
        sent = [run.submit_forward(0, *batch(65536, seed), save_for_backward=False) for seed in range(3)]
        assert [each.result().shape for each in sent] == 3 * [(65536, 32)]


def test_tensors_outlive_server_and_client(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess(qwen3_checkpoint, tmp_path / "log") as server:
        client = kt.connect(server.address, transport="same-host")
        output, *_ = one_pass(opened(client), 1, TOKENS)
        copied = output.clone()
        server.process.kill()
        client.close()
    assert torch.equal(output, copied)


def test_memory_is_counted_and_given_back(server: ServerProcess) -> None:
    def shared() -> float:
        return server.metric('kt_expert_memory_bytes{kind="shared"}')

    gc.collect()
    before = shared()
    with kt.connect(server.address, transport="same-host") as client:
        run = opened(client)
        assert shared() - before == 4096 + 2 * len(_memory(run)._outgoing) + 2 * native.FAST_PAYLOAD_BYTES
    wait_until(lambda: shared() <= before)


def _mappings(pid: int) -> int:
    """Of shared memory in a process."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:kt-expert")


def test_memory_goes_with_its_connection_and_not_with_the_collector(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    gc.collect()
    before = _mappings(os.getpid())
    gc.disable()
    try:
        with ServerProcess(qwen3_checkpoint, tmp_path / "log") as server:
            for _ in range(3):
                with kt.connect(server.address, transport="same-host") as client:
                    run = opened(client)
                    one_pass(run, 1, TOKENS)
                    assert _mappings(server.process.pid) == 1
                    del run
                wait_until(lambda: _mappings(server.process.pid) == 0, 5.0)
                wait_until(lambda: _mappings(os.getpid()) == before, 5.0)
    finally:
        gc.enable()


def test_a_server_without_it_is_reached_by_a_stream(
    qwen3_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", "--same-host", "off") as server:
        with (
            kt.connect(server.address, transport="same-host") as client,
            pytest.raises(
                kt.InvalidRequest,
                match=r"'same-host', and there is no connection on this host: .* --same-host off",
            ),
        ):
            opened(client)
        with caplog.at_level(logging.INFO), kt.connect(server.address, transport="auto") as client:
            one_pass(opened(client), 1, TOKENS)
            assert client.transport == "stream"
    assert "there is no connection on this host, so tcp is tried: the server was started with --same-host off" in caplog.text
    assert "there is no connection to the server's data port, so stream is tried: the server was started without" in caplog.text


def test_a_socket_that_is_not_here_is_told(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KT_EXPERT_SAME_HOST_DIR", str(tmp_path))
    with caplog.at_level(logging.INFO), kt.connect(server.address, transport="auto") as client:
        opened(client)
        assert client.transport == "tcp"  # the next one
    assert f"its socket {tmp_path}/" in caplog.text
    assert "is not to be reached from here: No such file or directory" in caplog.text


def test_somebody_elses_socket_gets_neither_secret_nor_trust(
    server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers as a server would that does not know the secret."""
    monkeypatch.setenv("KT_EXPERT_SAME_HOST_DIR", str(tmp_path))
    with kt.connect(server.address) as client:
        offer = client._stub.OfferSameHost(pb.SameHostRequest(), timeout=10.0)
        path = str(tmp_path / Path(offer.socket_path).name)
        with socket.socket(socket.AF_UNIX) as impostor:
            impostor.bind(path)
            impostor.listen()

            def answer() -> None:
                connection, _ = impostor.accept()
                with connection:
                    connection.recv(1024)
                    descriptor = os.memfd_create("impostor", os.MFD_ALLOW_SEALING)
                    os.ftruncate(descriptor, 3 * 4096)
                    socket.send_fds(connection, [b"\1" + bytes(32)], [descriptor, descriptor])
                    os.close(descriptor)
                    connection.recv(1024)

            thread = threading.Thread(target=answer)
            thread.start()
            with caplog.at_level(logging.INFO):
                run = opened(client)
            thread.join()
            assert client.transport == "tcp"  # the next one
            one_pass(run, 1, TOKENS)
    assert "the memory has seals" in caplog.text


@pytest.mark.parametrize("variable", ["KT_EXPERT_TRANSPORT", None])
def test_a_transport_there_is_not(server: ServerProcess, variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_EXPERT_TRANSPORT", "rdma" if variable else "auto")
    with pytest.raises(kt.InvalidRequest, match=r"is 'rdma', expected one of auto, same-host, tcp, stream"):
        kt.connect(server.address, transport=None if variable else "rdma")


def test_a_directory_that_others_can_read_is_refused(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(
        AssertionError, match=r"--same-host .*open has mode 755 .* expected a directory of user \d+ with mode 700"
    ):
        ServerProcess(qwen3_checkpoint, tmp_path / "log", "--same-host", str(tmp_path / "open"))
    with pytest.raises(AssertionError, match="--same-host is 'here', expected an absolute path, auto or off"):
        ServerProcess(qwen3_checkpoint, tmp_path / "log", "--same-host", "here")


def test_without_a_place_for_it_the_server_starts_and_says_so(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "kt-expert").write_text("no directory")
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", environment={"XDG_RUNTIME_DIR": str(tmp_path)}) as server:
        with kt.connect(server.address, transport="auto") as client:
            opened(client)
            assert client.transport == "stream"
        assert "trainers on this host will not share memory with the server" in server.log.read_text()


def test_sockets_of_servers_that_are_gone_are_removed(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    directory = tmp_path / "sockets"
    for _ in range(2):
        with ServerProcess(qwen3_checkpoint, tmp_path / "log", "--same-host", str(directory)) as server:
            assert len(list(directory.iterdir())) == 1
            server.process.kill()
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", "--same-host", str(directory)):
        pass
    assert list(directory.iterdir()) == []
