"""What a stranger, or a trainer that means harm, may try with the data port."""

from __future__ import annotations

import socket
import ssl
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from kt_expert_proto.data_plane import MAGIC
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.handshake import GREETING_BYTES
from kt_expert_proto.header import FrameError, FrameType, Header, Op, Tensor
from kt_expert_proto.shared import Place
from kt_expert_proto.status import STATUS_NUMBERS
from kt_expert_proto.v1 import service_pb2 as pb
from support.raw import HIDDEN
from support.raw_same_host import RawSameHost
from support.raw_socket import RawDataPlane, greet
from support.server import ServerProcess

TOKENS = 32768  # hidden states of 4 MiB, in pieces of one
PATIENCE_S = 20.0


@pytest.fixture
def attacker(server: ServerProcess) -> Iterator[RawDataPlane]:
    with RawDataPlane(server.address, f"attack-{uuid.uuid4().hex}") as member:
        yield member


def _stranger(attacker: RawDataPlane) -> socket.socket:
    return socket.create_connection((attacker.host, attacker.offer().port), PATIENCE_S)


def test_frames_are_answered(attacker: RawDataPlane) -> None:
    """Or what follows would prove nothing."""
    assert attacker.ask(attacker.forward_frames(attacker.take_id()))[0] is grpc.StatusCode.OK


def test_the_secret_has_to_be_known(attacker: RawDataPlane) -> None:
    with greet(attacker.offer(), attacker.host, secret=bytes(32)) as connection:
        assert b"has not shown that the offer is its own" in connection.recv(1024)


def test_an_offer_is_good_once_and_for_one(attacker: RawDataPlane) -> None:
    offer = attacker.offer()
    greet(offer, attacker.host).close()
    for offer_id in (offer.offer_id, bytes(16)):
        with pytest.raises(FrameError, match="was not offered, or not lately"):
            greet(pb.DataPlaneOffer(port=offer.port, offer_id=offer_id, secret=offer.secret), attacker.host)


def test_an_offer_for_this_host_is_none_for_the_data_port(server: ServerProcess, attacker: RawDataPlane) -> None:
    with RawSameHost(server.address, f"attack-{uuid.uuid4().hex}") as other:
        offer = other.stub.OfferSameHost(pb.SameHostRequest())
        port = attacker.offer().port
        with pytest.raises(FrameError, match="was not offered"):
            greet(pb.DataPlaneOffer(port=port, offer_id=offer.offer_id, secret=offer.secret), attacker.host)


@pytest.mark.parametrize("said", [b"", MAGIC, MAGIC + bytes(16)], ids=["nothing", "a magic", "half a greeting"])
def test_who_does_not_go_on_is_let_go(attacker: RawDataPlane, said: bytes) -> None:
    with _stranger(attacker) as silent:
        silent.sendall(said)
        assert silent.recv(1) == b""


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3, bytes(range(256))], ids=["http", "bytes"])
def test_garbage_instead_of_a_greeting(attacker: RawDataPlane, said: bytes) -> None:
    with _stranger(attacker) as stranger:
        stranger.sendall(said[:GREETING_BYTES])
        assert b"was not offered" in stranger.recv(1024)


def test_who_never_greets_takes_nothing_from_others(server: ServerProcess, attacker: RawDataPlane) -> None:
    """More than may be in their greeting at a time."""
    silent = [_stranger(attacker) for _ in range(80)]
    try:
        assert attacker.ask(attacker.forward_frames(attacker.take_id()))[0] is grpc.StatusCode.OK
    finally:
        for each in silent:
            each.close()
    with RawDataPlane(server.address, f"attack-{uuid.uuid4().hex}") as other:
        assert other.ask(other.forward_frames(other.take_id()))[0] is grpc.StatusCode.OK


def test_tls_is_not_left_out(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    """A greeting in the clear to a port with TLS, and TLS that is older than both ends are."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    options = ("--tls-cert", str(tmp_path / "cert"), "--tls-key", str(tmp_path / "key"), "--data-listen", "127.0.0.1:0")
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *options) as server:
        host, port = str(server.data_address).rsplit(":", 1)
        with socket.create_connection((host, int(port)), PATIENCE_S) as stranger:
            stranger.sendall(MAGIC + bytes(GREETING_BYTES - len(MAGIC)))
            with suppress(ConnectionResetError):
                assert stranger.recv(1024)[:1] in (b"", b"\x15")  # nothing, or TLS's alert
        context = ssl.create_default_context()
        authority.configure_trust(context)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection((host, int(port)), PATIENCE_S) as stranger, pytest.raises(ssl.SSLError):
            context.wrap_socket(stranger, server_hostname="localhost")


@pytest.mark.parametrize("kind", [FrameType.END, FrameType.RESULT, FrameType.JOIN])
def test_frames_that_do_not_travel_to_the_server(attacker: RawDataPlane, kind: FrameType) -> None:
    attacker.send((Header(kind, epoch=attacker.epoch, op=Op.NONE), b""))
    assert attacker.ended_with().code == STATUS_NUMBERS["INVALID_ARGUMENT"]


def test_there_is_no_shared_memory(attacker: RawDataPlane) -> None:
    attacker.free(Place(0, 1))
    end = attacker.ended_with()
    assert end.code == STATUS_NUMBERS["INVALID_ARGUMENT"]
    assert "is about shared memory; this connection has none" in end.message


def test_a_tensor_in_memory_that_there_is_not(attacker: RawDataPlane) -> None:
    frames = attacker.forward_frames(attacker.take_id())
    attacker.send(*frames[:-1], (frames[-1][0], Place(0, 1)))
    assert "is about shared memory; this connection has none" in attacker.ended_with().message


def test_bytes_that_are_no_frames(attacker: RawDataPlane) -> None:
    attacker.send_bytes(bytes(range(256)) * 8)
    assert "a message announces" in attacker.ended_with().message


@pytest.mark.parametrize("at", [2, 3], ids=["between", "last"])
def test_a_piece_that_was_changed_on_its_way(attacker: RawDataPlane, at: int) -> None:
    """It is received where the tensor is, and the tensor never reaches the engine."""
    messages = _large_forward(attacker)
    changed = bytearray(messages[at])
    changed[-1] ^= 1
    for message in [*messages[:at], bytes(changed)]:
        attacker.send_bytes(message)
    assert "checksum does not match" in attacker.ended_with().message


def _large_forward(attacker: RawDataPlane) -> list[bytes]:
    """Messages of a forward whose hidden states come in pieces."""
    request_id = attacker.take_id()
    ids, weights = np.zeros((TOKENS, 2), np.int32), np.full((TOKENS, 2), 0.5, np.float32)
    frames = attacker.forward_frames(request_id, ids=ids, weights=weights, rows=TOKENS)
    hidden = attacker.tensor(request_id, Tensor.HIDDEN_STATES, Dtype.FP32, np.ones((TOKENS, HIDDEN), np.float32))
    return [*attacker._encoder.messages(frames[:-1]), *attacker._encoder.messages([hidden])]


def test_what_ends_in_the_middle_of_a_tensor_gives_its_memory_back(server: ServerProcess, attacker: RawDataPlane) -> None:
    messages = _large_forward(attacker)
    for message in messages[:-2]:
        attacker.send_bytes(message)
    attacker.send_bytes(messages[-2][: len(messages[-2]) // 2])
    attacker.socket.close()
    with RawDataPlane(server.address, f"attack-{uuid.uuid4().hex}") as other:
        assert other.ask(other.forward_frames(other.take_id()))[0] is grpc.StatusCode.OK
