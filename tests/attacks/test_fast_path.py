"""What a trainer on the server's host may try with the way for small forwards."""

from __future__ import annotations

import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress

import grpc
import numpy as np
import pytest
from kt_expert_proto.fast_path import ANSWER_BYTES, BUSY, DONE, MOST_BYTES, MOST_TOKENS, REFUSED, UNKNOWN, answer, request
from kt_expert_proto.header import FrameType
from support.raw import EXPERTS, HIDDEN, TOP_K, RawMember
from support.raw_same_host import RawSameHost
from support.server import ServerProcess

PATIENCE_S = 20.0
SERVED = (DONE, BUSY)


class Attacker(RawSameHost):
    """Has been told an entry."""

    def __enter__(self) -> Attacker:
        self.fast = socket.socket(fileno=os.dup(self.fast_descriptor))
        self.fast.settimeout(PATIENCE_S)
        self.sequence = 0
        assert self.ask(self.forward_frames(self.take_id(), save=False))[0].value[0] == 0
        self.entry = self.head.fast_entry
        assert self.entry
        return self

    def __exit__(self, *error: object) -> None:
        self.fast.close()
        super().__exit__(*error)

    def tensors(self, tokens: int = 1, ids: int = 0) -> bytes:
        return (
            np.full((tokens, TOP_K), ids, np.int32).tobytes()
            + np.full((tokens, TOP_K), 0.5, np.float32).tobytes()
            + np.ones((tokens, HIDDEN), np.float32).tobytes()
        )

    def send_fast(self, tensors: bytes, *, entry: int | None = None, tokens: int = 1) -> None:
        self.sequence += 1
        self.fast.sendall(request(self.entry if entry is None else entry, tokens, self.sequence, len(tensors)) + tensors)

    def status(self) -> int:
        """Of the next answer, which has to be to the last request."""
        head = self._exactly(ANSWER_BYTES)
        sequence, status, size = answer(head)
        self._exactly(size)
        assert sequence == self.sequence
        return status

    def ask_for_ever(self) -> None:
        while True:
            self.send_fast(self.tensors())
            self.status()

    def _exactly(self, size: int) -> bytes:
        received = b""
        while len(received) < size:
            piece = self.fast.recv(size - len(received))
            if not piece:
                raise ConnectionResetError
            received += piece
        return received


@pytest.fixture
def attacker(server: ServerProcess) -> Iterator[Attacker]:
    with Attacker(server.address, f"attack-{uuid.uuid4().hex}") as member:
        yield member


def test_a_request_is_answered(attacker: Attacker) -> None:
    """Or what follows would prove nothing."""
    attacker.send_fast(attacker.tensors())
    assert attacker.status() in SERVED


def test_an_entry_is_its_connections_own(attacker: Attacker, server: ServerProcess) -> None:
    with Attacker(server.address, f"attack-{uuid.uuid4().hex}") as other:
        for entry in (other.entry, 0, 1, attacker.entry + 1, attacker.entry - 1, 2**64 - 1):
            attacker.send_fast(attacker.tensors(), entry=entry)
            assert attacker.status() == UNKNOWN


WRONG = {
    "an expert there is not": (1, 0, EXPERTS + 1),
    "a negative expert": (1, 0, -1),
    "no tokens": (0, 0, 0),
    "too many tokens": (MOST_TOKENS + 1, 0, 0),
    "more tokens than bytes": (5, 0, 0),
    "a byte too few": (1, -1, 0),
    "a byte too many": (1, 1, 0),
    "more than there can be": (2**32 - 1, 0, 0),
}


@pytest.mark.parametrize(("tokens", "more", "ids"), WRONG.values(), ids=WRONG.keys())
def test_requests_that_make_no_sense(attacker: Attacker, tokens: int, more: int, ids: int) -> None:
    tensors = attacker.tensors(1, ids) + bytes(max(more, 0))
    attacker.send_fast(tensors[: len(tensors) + min(more, 0)], tokens=tokens)
    assert attacker.status() in (REFUSED, BUSY)
    attacker.send_fast(attacker.tensors())
    assert attacker.status() in SERVED


@pytest.mark.parametrize(
    "said",
    [bytes(32), bytes(range(256)) * 64, request(1, 1, 1, MOST_BYTES + 1), request(1, 1, 1, 2**32 - 1)],
    ids=["zeros", "bytes", "too large", "far too large"],
)
def test_what_is_no_request_ends_that_way_alone(attacker: Attacker, said: bytes) -> None:
    attacker.fast.sendall(said)
    with pytest.raises(ConnectionResetError):
        attacker._exactly(1)
    attacker.send(*attacker.forward_frames(attacker.take_id()))
    assert attacker.outcome()[0][0].type is FrameType.RESULT


def test_answers_that_nobody_reads(attacker: Attacker, server: ServerProcess) -> None:
    """Its thread waits, and nobody else does."""
    attacker.fast.setblocking(False)
    tensors = attacker.tensors(MOST_TOKENS)
    message, sent = request(attacker.entry, MOST_TOKENS, 1, len(tensors)) + tensors, 0
    with suppress(BlockingIOError):
        while sent < 1 << 30:
            sent += attacker.fast.send(message)
    assert 0 < sent < 1 << 30
    attacker.send(*attacker.forward_frames(attacker.take_id()))
    assert attacker.outcome()[0][0].type is FrameType.RESULT
    with Attacker(server.address, f"attack-{uuid.uuid4().hex}") as other:
        other.send_fast(other.tensors())
        assert other.status() in SERVED


def test_half_a_request_and_then_nothing(attacker: Attacker) -> None:
    attacker.fast.sendall(request(attacker.entry, 1, 1, 1000) + bytes(500))
    attacker.send(*attacker.forward_frames(attacker.take_id()))
    assert attacker.outcome()[0][0].type is FrameType.RESULT


def test_after_its_stream_there_is_nothing(server: ServerProcess) -> None:
    with Attacker(server.address, f"attack-{uuid.uuid4().hex}") as attacker:
        attacker.socket.close()
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            attacker.ask_for_ever()


def test_who_never_pauses_keeps_nobody_from_the_engine(attacker: Attacker, server: ServerProcess) -> None:
    """Requests are there before the answers to those before are read."""
    ahead = 8
    tensors = attacker.tensors(MOST_TOKENS)
    message = request(attacker.entry, MOST_TOKENS, 1, len(tensors)) + tensors
    stop = threading.Event()

    def flood() -> None:
        attacker.fast.sendall(ahead * message)
        while not stop.is_set():
            _, _, size = answer(attacker._exactly(ANSWER_BYTES))
            attacker._exactly(size)
            attacker.fast.sendall(message)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        with RawMember(server.address, f"bystander-{uuid.uuid4().hex}") as other:
            for _ in range(50):
                assert other.ask(other.forward_frames(other.take_id()))[0] is grpc.StatusCode.OK
    finally:
        stop.set()
        thread.join()
