"""What a process on the server's host may try with the socket and with the memory that it shares."""

from __future__ import annotations

import os
import socket
import stat
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameError, FrameType, Header, Op, Tensor
from kt_expert_proto.shared import GRANULE_BYTES, Place
from kt_expert_proto.status import STATUS_NUMBERS
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from kt_expert_server.edge.same_host import listener
from kt_expert_server.errors import NotPermitted
from support.adapters import ACTIVE
from support.raw import HIDDEN, TOP_K
from support.raw_same_host import RawSameHost, shake_hands
from support.server import ServerProcess

TOKENS = 8192  # ids of 64 KiB, hidden states of 1 MiB


@pytest.fixture
def attacker(server: ServerProcess) -> Iterator[RawSameHost]:
    with RawSameHost(server.address, f"attack-{uuid.uuid4().hex}") as member:
        yield member


def _offer(attacker: RawSameHost) -> pb.SameHostOffer:
    offer: pb.SameHostOffer = attacker.stub.OfferSameHost(pb.SameHostRequest())
    return offer


def _forward(attacker: RawSameHost, request_id: int) -> list[tuple[Header, bytes | Place]]:
    """A forward whose tensors all lie in shared memory."""
    ids, weights = np.zeros((TOKENS, TOP_K), np.int32), np.full((TOKENS, TOP_K), 0.5, np.float32)
    x = np.ones((TOKENS, HIDDEN), np.float32)
    opened = spb.RequestOpen(forward=spb.Forward(top_k=TOP_K, adapters=ACTIVE))
    frames: list[tuple[Header, bytes | Place]] = [
        (attacker.header(FrameType.REQUEST, request_id, rows=TOKENS), opened.SerializeToString())
    ]
    offset = 0
    for tensor, dtype, values in (
        (Tensor.EXPERT_IDS, Dtype.INT32, ids), (Tensor.ROUTING_WEIGHTS, Dtype.FP32, weights),
        (Tensor.HIDDEN_STATES, Dtype.FP32, x),
    ):  # fmt: skip
        header, _ = attacker.tensor(request_id, tensor, dtype, values)
        frames.append((header, attacker.put(values, Place(offset, 3 * request_id + len(frames)))))
        offset += values.nbytes
    return frames


def test_the_secret_has_to_be_known(attacker: RawSameHost) -> None:
    connection, *descriptors = shake_hands(_offer(attacker), secret=bytes(32))
    with connection:
        assert b"has not shown that it sees this server's memory" in connection.recv(1024)
    for each in descriptors:
        os.close(each)


def test_an_offer_is_good_once_and_for_one(attacker: RawSameHost) -> None:
    offer = _offer(attacker)
    connection, *descriptors = shake_hands(offer)
    connection.close()
    for each in descriptors:
        os.close(each)
    for offer_id in (offer.offer_id, bytes(16)):
        with pytest.raises(FrameError, match="was not offered, or not lately"):
            shake_hands(pb.SameHostOffer(socket_path=offer.socket_path, offer_id=offer_id, secret=offer.secret))


def test_who_says_nothing_is_let_go(attacker: RawSameHost, server: ServerProcess) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(_offer(attacker).socket_path)
        silent.settimeout(20.0)
        assert silent.recv(1) == b""


def test_garbage_instead_of_a_greeting(attacker: RawSameHost) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(_offer(attacker).socket_path)
        stranger.sendall(bytes(range(256)))
        stranger.settimeout(20.0)
        assert b"was not offered" in stranger.recv(1024)


def test_other_users_are_kept_out(attacker: RawSameHost, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(_offer(attacker).socket_path)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    class Stranger(socket.socket):
        def getsockopt(self, *_: object) -> bytes:  # type: ignore[override]
            return struct.pack("3i", 1, 4711, 4711)

    with Stranger(socket.AF_UNIX) as connection, pytest.raises(NotPermitted, match="user 4711 may not share memory"):
        listener._check_user(connection)


def test_memory_cannot_be_resized(attacker: RawSameHost) -> None:
    for size in (0, 4096, 1 << 40):
        with pytest.raises(PermissionError):
            os.ftruncate(attacker.descriptor, size)
    with pytest.raises(PermissionError):
        os.posix_fallocate(attacker.descriptor, 1 << 40, 4096)
    attacker.send(*_forward(attacker, attacker.take_id()))
    assert attacker.outcome()[0][0].type is FrameType.RESULT


def test_values_that_change_after_they_were_sent_decide_nothing(attacker: RawSameHost) -> None:
    """Ids and weights are copied before they are looked at; hidden states may be anything."""
    attacker.send(*_forward(attacker, attacker.take_id()))
    for _ in range(50):
        attacker.outgoing[: 4 * TOKENS * TOP_K] = 0x7F
        attacker.outgoing[: 4 * TOKENS * TOP_K] = 0xFF
    header, _ = attacker.outcome()[0]
    assert header.type in (FrameType.RESULT, FrameType.ERROR)  # as they were when they were copied
    attacker.send(*_forward(attacker, attacker.take_id()))
    assert attacker.outcome()[0][0].type is FrameType.RESULT


def _at(attacker: RawSameHost, place: Place) -> list[tuple[Header, bytes | Place]]:
    """A forward whose hidden states are said to lie there."""
    frames = _forward(attacker, attacker.take_id())
    return [*frames[:-1], (frames[-1][0], place)]


PLACES = {
    "outside": (lambda region: Place(region, 99), "an end up to"),
    "over the end": (lambda region: Place(region - GRANULE_BYTES, 99), "an end up to"),
    "behind everything": (lambda _: Place(2**64 - GRANULE_BYTES, 99), "an end up to"),
    "between pages": (lambda _: Place(GRANULE_BYTES + 1, 99), "the begin of a page"),
    "an old generation": (lambda _: Place(1 << 20, 1), "of shared memory came after"),
}


@pytest.mark.parametrize(("place", "text"), PLACES.values(), ids=PLACES.keys())
def test_places_that_cannot_be(attacker: RawSameHost, place: object, text: str) -> None:
    attacker.send(*_at(attacker, place(attacker.region)))  # type: ignore[operator]
    end = attacker.ended_with()
    assert end.code == STATUS_NUMBERS["INVALID_ARGUMENT"]
    assert text in end.message


def test_a_place_that_is_read_still(attacker: RawSameHost) -> None:
    """The server computes from it."""
    attacker.send(*_forward(attacker, attacker.take_id()))
    later = _forward(attacker, attacker.take_id())
    hidden = later[-1][0]
    attacker.send(*later[:-1], (hidden, Place(2 * 4 * TOKENS * TOP_K, 100)))
    try:
        outcome = attacker.outcome()
        assert outcome[0][0].type is FrameType.RESULT  # it had done with it by then
    except (StopIteration, AssertionError):
        assert attacker.end is not None
        assert "still in use" in attacker.end.message


@pytest.mark.parametrize("place", [Place(0, 1), Place(GRANULE_BYTES, 2**63)], ids=["not lent", "of no generation"])
def test_giving_back_what_was_not_lent(attacker: RawSameHost, place: Place) -> None:
    attacker.free(place)
    end = attacker.ended_with()
    assert end.code == STATUS_NUMBERS["INVALID_ARGUMENT"]
    assert "was given back and is not lent" in end.message


def test_giving_back_twice(attacker: RawSameHost) -> None:
    attacker.send(*_forward(attacker, attacker.take_id()))
    attacker.outcome()
    (place,) = attacker.lent
    attacker.free(place)
    attacker.free(place)
    assert "was given back and is not lent" in attacker.ended_with().message


def test_who_gives_nothing_back_gets_outcomes_all_the_same(attacker: RawSameHost) -> None:
    """They are sent once there is no more room for them."""
    rounds = attacker.region // (4 * TOKENS * HIDDEN) + 3
    for _ in range(rounds):
        request_id = attacker.take_id()
        attacker.send(*_forward(attacker, request_id))
        frames = attacker.outcome()
        assert [header.type for header, _ in frames] == [FrameType.RESULT, FrameType.TENSOR]
        assert len(frames[1][1]) == 4 * TOKENS * HIDDEN
        attacker.acknowledge(request_id)
    assert len(attacker.lent) < rounds


@pytest.mark.parametrize("kind", [FrameType.END, FrameType.RESULT, FrameType.JOIN])
def test_frames_that_do_not_travel_to_the_server(attacker: RawSameHost, kind: FrameType) -> None:
    attacker.send((Header(kind, epoch=attacker.epoch, op=Op.NONE), b""))
    assert attacker.ended_with().code == STATUS_NUMBERS["INVALID_ARGUMENT"]


def test_bytes_that_are_no_frames(attacker: RawSameHost) -> None:
    attacker.send_bytes(bytes(range(256)) * 8)
    assert "a message announces" in attacker.ended_with().message
