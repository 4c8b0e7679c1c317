"""The trainer's end of the way for small forwards, with servers that answer as they like."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator

import pytest
from kt_expert_client.wire import fast_path as module
from kt_expert_client.wire.fast_path import FastPath
from kt_expert_proto.fast_path import BUSY, DONE, MOST_BYTES, MOST_TOKENS, REFUSED, UNKNOWN, request

KEY, ENTRY = ("layer", 0), 77
OUTPUT = bytes(range(64))
TENSORS = [memoryview(b"ids and "), memoryview(b"weights "), memoryview(bytes(64))]
SIZE = sum(map(len, TENSORS))


def packed(sequence: int, status: int, content: bytes = b"", magic: bytes = b"KTFA", size: int | None = None) -> bytes:
    return magic + struct.pack("<III", sequence, status, len(content) if size is None else size) + content


class Ends:
    def __init__(self, spin_s: float) -> None:
        here, self.server = socket.socketpair()
        self.server.settimeout(10.0)
        self.path = FastPath(here.detach(), spin_s)
        self.path.learn(KEY, ENTRY)

    def begin(self, key: object = KEY, tokens: int = 1) -> module.FastCall | None:
        return self.path.begin(key, tokens, TENSORS)  # type: ignore[arg-type]

    def begun(self) -> module.FastCall:
        call = self.begin()
        assert call is not None
        return call


@pytest.fixture(params=[0.0, 50e-6], ids=["sleeping", "spinning"])
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    monkeypatch.setattr(module, "_PATIENCE_S", 1.0)
    made = Ends(request.param)
    yield made
    made.path.close()
    made.server.close()


def test_what_is_sent_and_what_comes(ends: Ends) -> None:
    for sequence in range(1, 4):
        call = ends.begun()
        assert ends.server.recv(1024) == request(ENTRY, 1, sequence, SIZE) + b"".join(TENSORS)
        ends.server.sendall(packed(sequence, DONE, OUTPUT))
        output = bytearray(len(OUTPUT))
        assert call.finish(memoryview(output))
        assert output == OUTPUT


def test_an_answer_in_bites(ends: Ends) -> None:
    call = ends.begun()
    message = packed(1, DONE, OUTPUT)
    ends.server.sendall(message[:5])
    output = bytearray(len(OUTPUT))

    class Bites:
        """Sends the rest once the first is asked for."""

        def __init__(self, real: socket.socket) -> None:
            self._real, self._left = real, [message[5:30], message[30:]]

        def recvmsg_into(self, buffers: list[memoryview]) -> tuple[int, object, int, object]:
            return self._real.recvmsg_into(buffers)

        def recv_into(self, memory: memoryview) -> int:
            if self._left:
                ends.server.sendall(self._left.pop(0))
            return self._real.recv_into(memory)

        def __getattr__(self, name: str) -> object:
            return getattr(self._real, name)

    ends.path._socket = Bites(ends.path._socket)  # type: ignore[assignment]
    assert call.finish(memoryview(output))
    assert output == OUTPUT


@pytest.mark.parametrize("status", [BUSY, REFUSED])
def test_a_server_that_will_not_is_asked_again_later(ends: Ends, status: int) -> None:
    call = ends.begun()
    ends.server.sendall(packed(1, status))
    assert not call.finish(memoryview(bytearray(64)))
    assert ends.begin() is not None


def test_an_entry_that_is_gone_is_forgotten(ends: Ends) -> None:
    call = ends.begun()
    ends.server.sendall(packed(1, UNKNOWN))
    assert not call.finish(memoryview(bytearray(64)))
    assert not ends.path.knows(KEY)
    assert ends.begin() is None
    ends.path.learn(KEY, 5)
    assert ends.begin() is not None


ANSWERS: dict[str, Callable[[int], bytes]] = {
    "to another request": lambda sequence: packed(sequence + 1, DONE, OUTPUT),
    "of another size": lambda sequence: packed(sequence, DONE, OUTPUT[:-1]),
    "too large": lambda sequence: packed(sequence, DONE, size=MOST_BYTES + 1),
    "with an output where there is none": lambda sequence: packed(sequence, BUSY, OUTPUT),
    "of something else": lambda sequence: packed(sequence, DONE, OUTPUT, magic=b"HTTP"),
    "that ends": lambda sequence: packed(sequence, DONE, OUTPUT)[:20],
    "that never comes": lambda _: b"",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_that_makes_no_sense_ends_it(ends: Ends, answer: Callable[[int], bytes]) -> None:
    call = ends.begun()
    ends.server.sendall(answer(1))
    assert not call.finish(memoryview(bytearray(64)))
    assert ends.begin() is None


def test_a_server_that_goes(ends: Ends) -> None:
    call = ends.begun()
    ends.server.close()
    assert not call.finish(memoryview(bytearray(64)))
    assert ends.begin() is None


def test_a_server_that_has_gone(ends: Ends) -> None:
    ends.server.close()
    assert ends.begin() is None


def test_one_at_a_time(ends: Ends) -> None:
    call = ends.begun()
    assert ends.begin() is None
    ends.server.sendall(packed(1, DONE, OUTPUT))
    assert call.finish(memoryview(bytearray(64)))
    assert ends.begin() is not None


@pytest.mark.parametrize("how", ["drop", "forget"])
def test_an_answer_that_nobody_wants_is_passed_over(ends: Ends, how: str) -> None:
    call: module.FastCall | None = ends.begun()
    if how == "drop":
        assert call is not None
        call.drop()
        call.drop()
    call = None
    ends.server.sendall(packed(1, DONE, OUTPUT))
    again = ends.begun()
    ends.server.sendall(packed(2, DONE, OUTPUT[::-1]))
    output = bytearray(64)
    assert again.finish(memoryview(output))
    assert output == OUTPUT[::-1]


@pytest.mark.parametrize("tokens", [0, MOST_TOKENS + 1])
def test_what_is_not_small_is_not_sent(ends: Ends, tokens: int) -> None:
    assert ends.begin(tokens=tokens) is None
    assert ends.begin(key="another") is None
    assert ends.path.begin(KEY, 1, [memoryview(bytes(MOST_BYTES + 1))]) is None


def test_closing_wakes_who_waits_and_closes_once(ends: Ends) -> None:
    call = ends.begun()
    ends.path.close()
    ends.path.close()
    assert not call.finish(memoryview(bytearray(64)))
    assert ends.path._socket.fileno() == -1
    assert ends.begin() is None
