"""The trainer's end of the way for small forwards that keep nothing (kt_expert_proto/fast_path.py)."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Hashable
from contextlib import suppress

from kt_expert_proto.codec import Part
from kt_expert_proto.fast_path import ANSWER_BYTES, DONE, MOST_BYTES, MOST_TOKENS, UNKNOWN, answer, request
from kt_expert_proto.messages import rest_of

# Far more than 64 tokens of any layer take. Whoever waits longer asks the ordinary way, which has deadlines and survives a
# server that is stopped or dies.
_PATIENCE_S = 2.0
_TIMEVAL = struct.Struct("@ll")  # of SO_RCVTIMEO: seconds, microseconds
_SEQUENCES = 1 << 32


class FastPath:
    """Of one connection. Any thread may ask; while one request is under way, others go the ordinary way."""

    def __init__(self, descriptor: int, spin_s: float) -> None:
        """Takes the descriptor. `spin_s`: how long to look for an answer before sleeping."""
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(True)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(_PATIENCE_S), 0))
        self._spin_s = spin_s
        self._lock = threading.Lock()  # of who asks; held from begin() to the call's end
        self._entries: dict[Hashable, int] = {}
        self._sequence = 0
        self._is_broken = False
        self._has_unread = False  # an answer that nobody wants

    def learn(self, key: Hashable, entry: int) -> None:
        """The like of a forward that was just made may be asked for by that number."""
        self._entries[key] = entry

    def knows(self, key: Hashable) -> bool:
        return key in self._entries

    def begin(self, key: Hashable, tokens: int, tensors: list[memoryview]) -> FastCall | None:
        """Sends a request. None where it has to go the ordinary way."""
        entry = self._entries.get(key)
        size = sum(map(len, tensors))
        if entry is None or self._is_broken or not 0 < tokens <= MOST_TOKENS or size > MOST_BYTES:
            return None
        if not self._lock.acquire(blocking=False):
            return None
        self._sequence = (self._sequence + 1) % _SEQUENCES
        try:
            self._pass_over_unread()
            parts: list[Part] = [request(entry, tokens, self._sequence, size), *tensors]
            while parts:
                parts = rest_of(parts, self._socket.sendmsg(parts))
        except (OSError, ValueError):
            self._give_up()
            return None
        return FastCall(self, key, self._sequence)

    def close(self) -> None:
        """Whoever waits is told at once. The descriptor goes with its last user. Safe to call twice."""
        self._is_broken = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._lock.acquire(blocking=False):
            self._release()

    def _release(self) -> None:
        """Lets others ask."""
        if self._is_broken:
            self._socket.close()
        self._lock.release()

    def _pass_over_unread(self) -> None:
        """The answer to a request whose caller has gone. Raises OSError, ValueError."""
        if self._has_unread:
            self._receive(memoryview(bytearray(MOST_BYTES)))
            self._has_unread = False

    def _give_up(self) -> None:
        """The two ends do not understand each other any more. Called with the lock held."""
        self._is_broken = True
        self._release()

    def _receive(self, output: memoryview) -> tuple[int, int, int]:
        """An answer's sequence, status and size; the output, where it is one that fits. Raises OSError where nothing comes,
        ValueError for what is no answer."""
        if self._spin_s:
            self._spin()
        head = memoryview(bytearray(ANSWER_BYTES))
        received = self._socket.recvmsg_into([head, output])[0]
        self._fill(head, received)
        found = answer(head)
        size = found[2]
        if size <= len(output):
            self._fill(output[:size], max(0, received - ANSWER_BYTES))
        return found

    def _fill(self, into: memoryview, received: int) -> None:
        """So many bytes are there."""
        while received < len(into):
            size = self._socket.recv_into(into[received:])
            if not size:
                raise ConnectionResetError("the server closed the connection")
            received += size

    def _spin(self) -> None:
        until = time.perf_counter() + self._spin_s
        while time.perf_counter() < until:
            try:
                self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
            except BlockingIOError:
                continue
            return


class FastCall:
    """One request. It is ended by finish() or drop(), or with the object."""

    def __init__(self, path: FastPath, key: Hashable, sequence: int) -> None:
        self._path, self._key, self._sequence = path, key, sequence
        self._is_over = False

    def finish(self, output: memoryview) -> bool:
        """Receives the output. False where the forward has to be asked for the ordinary way. To be called once."""
        path, self._is_over = self._path, True
        try:
            sequence, status, size = path._receive(output)
            is_sound = sequence == self._sequence and size == (len(output) if status == DONE else 0)
        except (OSError, ValueError):
            is_sound = False
        except BaseException:  # an interrupt from the keyboard: where the answer ends is not known any more
            path._give_up()
            raise
        if not is_sound:
            path._give_up()
            return False
        if status == UNKNOWN:
            path._entries.pop(self._key, None)  # the ordinary forward tells another one
        path._release()
        return status == DONE

    def drop(self) -> None:
        """Nobody wants the output."""
        if not self._is_over:
            self._is_over = True
            self._path._has_unread = True
            self._path._release()

    def __del__(self) -> None:
        self.drop()
