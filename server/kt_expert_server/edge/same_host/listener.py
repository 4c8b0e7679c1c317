"""The unix socket that trainers on this host come to, and the offers they come with."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import stat
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kt_expert_proto.same_host import (
    ACCEPTED,
    CHALLENGE_BYTES,
    CONTROL_BYTES,
    GREETING_BYTES,
    MAGIC,
    MAX_PATH_BYTES,
    MAX_REASON_BYTES,
    OFFER_ID_BYTES,
    PROOF_BYTES,
    REFUSED,
    SECRET_BYTES,
    is_proof,
    proof,
)

from kt_expert_server.edge.driver import Driver
from kt_expert_server.edge.entrance import Caller
from kt_expert_server.edge.pace import Pace
from kt_expert_server.edge.same_host.memory import SharedMemory
from kt_expert_server.edge.same_host.stream import SameHostStream
from kt_expert_server.engine.budget import MemoryBudget
from kt_expert_server.engine.buffers import BufferPool
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import ListenError, NotAuthenticated, NotPermitted, OutOfCapacity, ServerError
from kt_expert_server.observe.metrics import Metrics

_log = logging.getLogger(__name__)
_METHOD = "SameHost"
_OFFER_S = 30.0  # how long an offer is good: a trainer connects at once
_MOST_OFFERS_OF_ONE = 16  # that are open, of one caller; a further one takes the place of the oldest
_MOST_OFFERS = 4096  # of all callers; each takes a few hundred bytes
_MOST_GREETINGS = 64  # connections that have not proved anything yet
_GREETING_S = 5.0  # for both messages of the handshake
_BACKLOG = 64
_PROBE_S = 1.0  # for a server of another process to take a connection
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: process, user, group
_ROOT = 0
_FULL_REGION_BYTES = 128 * 1024 * 1024  # each way: two large batches in flight and the outcomes of two more
_LEAST_REGION_BYTES = 1024 * 1024
_PART_OF_LIMIT = 32  # a region takes at most this part of the server's memory limit


def region_bytes(limit_bytes: int) -> int:
    """Of each direction of one trainer's shared memory, whole pages. 0 where the server has too little memory for it."""
    size = min(_FULL_REGION_BYTES, limit_bytes // _PART_OF_LIMIT // CONTROL_BYTES * CONTROL_BYTES)
    return size if size >= _LEAST_REGION_BYTES else 0


@dataclass(frozen=True, slots=True)
class Offer:
    """One connection that one caller may make."""

    offer_id: bytes
    secret: bytes
    caller: Caller
    until: float


@dataclass(frozen=True, slots=True)
class Parts:
    """Of the server, what a connection needs."""

    driver: Driver
    metrics: Metrics
    pace: Pace
    budget: MemoryBudget
    pool: BufferPool


class SameHost:
    """Listens in a directory of its user's own. Used from the event loop's thread."""

    def __init__(self, directory: Path, parts: Parts) -> None:
        """Raises ListenError for a directory that others can write to, or that cannot be made."""
        self._parts = parts
        self._region_bytes = region_bytes(parts.budget.limit_bytes)
        self.path = _prepare(directory) / f"{secrets.token_hex(8)}.sock"
        if len(os.fsencode(self.path)) > MAX_PATH_BYTES:
            raise ListenError(f"--same-host {directory}: a socket's path has at most {MAX_PATH_BYTES} bytes, got {self.path}")
        self._offers: dict[bytes, Offer] = {}
        self._greetings = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Raises ListenError."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listening.bind(str(self.path))
            self.path.chmod(stat.S_IRUSR | stat.S_IWUSR)
            listening.listen(_BACKLOG)
        except OSError as error:
            listening.close()
            raise ListenError(f"cannot listen on unix:{self.path}: {error.strerror}") from error
        self._socket = listening
        self._accepting = asyncio.get_running_loop().create_task(self._accept(listening))

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more connections, gives those that are there so long to end, and removes the socket. Safe to call twice."""
        if self._accepting is not None:
            self._accepting.cancel()
        if self._tasks and grace_s:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self.path.unlink(missing_ok=True)

    def offer(self, caller: Caller) -> Offer:
        """Older ones give way where too many are open: nobody can keep others from getting theirs."""
        now = time.monotonic()
        self._offers = {key: each for key, each in self._offers.items() if each.until > now}
        own = [key for key, each in self._offers.items() if each.caller == caller]
        if len(own) >= _MOST_OFFERS_OF_ONE:
            del self._offers[own[0]]
        elif len(self._offers) >= _MOST_OFFERS:
            del self._offers[next(iter(self._offers))]
        made = Offer(secrets.token_bytes(OFFER_ID_BYTES), secrets.token_bytes(SECRET_BYTES), caller, now + _OFFER_S)
        self._offers[made.offer_id] = made
        return made

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except OSError as error:  # out of descriptors: others will be closed
                _log.warning("a trainer's connection could not be accepted: %s", error)
                await asyncio.sleep(1.0)
                continue
            if self._greetings >= _MOST_GREETINGS:
                connection.close()
                continue
            connection.setblocking(False)
            task = loop.create_task(self._serve(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, connection: socket.socket) -> None:
        begun, code = time.monotonic(), "OK"
        parts = self._parts
        parts.metrics.call_started(_METHOD)
        with connection:
            try:
                await self._connect(connection)
            except ServerError as error:
                code = error.code
                with suppress(OSError):
                    connection.send(REFUSED + str(error).encode()[:MAX_REASON_BYTES])
            except (OSError, TimeoutError) as error:
                code = "UNAVAILABLE"
                _log.debug("a trainer on this host went while it connected: %s", error)
            except asyncio.CancelledError:
                code = "CANCELLED"
                raise
            except Exception:  # nobody else would tell of it
                code = "INTERNAL"
                _log.exception("a fault in a connection on this host")
            finally:
                parts.metrics.call_ended(_METHOD, code, time.monotonic() - begun)

    async def _connect(self, connection: socket.socket) -> None:
        parts = self._parts
        _check_user(connection)
        self._greetings += 1
        try:
            offer, greeting = await asyncio.wait_for(self._greeting(connection), _GREETING_S)
        finally:
            self._greetings -= 1
        if not self._region_bytes:
            raise OutOfCapacity("the server's memory limit leaves no room for memory that trainers share")
        size = CONTROL_BYTES + 2 * self._region_bytes
        held = parts.budget.reserve(Kind.SHARED, size, offer.caller.identity, "memory that a trainer on this host shares")
        try:
            memory = _made(self._region_bytes)
            try:
                await asyncio.wait_for(_share(connection, memory, offer, greeting), _GREETING_S)
            finally:
                memory.close()
            await SameHostStream(parts.driver, parts.metrics, parts.pace, offer.caller, connection, memory, parts.pool).run()
        finally:
            held.release()

    async def _greeting(self, connection: socket.socket) -> tuple[Offer, bytes]:
        """Raises NotAuthenticated for anything but the id of an open offer, which is not open any more then."""
        greeting = await _receive(connection, GREETING_BYTES)
        offer_id = greeting[len(MAGIC) : len(MAGIC) + OFFER_ID_BYTES]
        offer = self._offers.pop(offer_id, None)
        if not greeting.startswith(MAGIC) or offer is None or time.monotonic() >= offer.until:
            raise NotAuthenticated("this connection was not offered, or not lately; ask for another offer")
        return offer, greeting


def _made(region_bytes: int) -> SharedMemory:
    """Raises OutOfCapacity where the system gives none."""
    try:
        return SharedMemory(region_bytes)
    except OSError as error:
        raise OutOfCapacity(f"memory to share could not be made: {error.strerror}") from error


async def _share(connection: socket.socket, memory: SharedMemory, offer: Offer, greeting: bytes) -> None:
    """Sends the memory with the server's proof, and takes the trainer's. Raises NotAuthenticated."""
    answer = ACCEPTED + proof(offer.secret, b"server", greeting[-CHALLENGE_BYTES:])
    socket.send_fds(connection, [answer], [memory.descriptor])  # an empty socket takes so little at once
    given = await _receive(connection, PROOF_BYTES)
    if not is_proof(given, offer.secret, b"client", memory.nonce):
        raise NotAuthenticated("the trainer has not shown that it sees this server's memory")


async def _receive(connection: socket.socket, size: int) -> bytes:
    """Raises ConnectionResetError where the other end closes before."""
    loop, received = asyncio.get_running_loop(), b""
    while len(received) < size:
        piece = await loop.sock_recv(connection, size - len(received))
        if not piece:
            raise ConnectionResetError("closed in the middle of the handshake")
        received += piece
    return received


def _check_user(connection: socket.socket) -> None:
    """Raises NotPermitted for another user's process: it was let into the directory by mistake."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(credentials)
    if user not in (os.geteuid(), _ROOT):
        raise NotPermitted(f"user {user} may not share memory with this server, which runs as user {os.geteuid()}")


def _prepare(directory: Path) -> Path:
    """Makes it where it is not there, and removes sockets that nobody listens on any more. Raises ListenError."""
    try:
        directory.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as error:
        raise ListenError(f"--same-host {directory} cannot be made: {error.strerror}") from error
    others = stat.S_IMODE(found.st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or others:
        raise ListenError(
            f"--same-host {directory} has mode {stat.S_IMODE(found.st_mode):o} and belongs to user {found.st_uid}; expected a "
            f"directory of user {os.geteuid()} with mode 700"
        )
    for left in directory.glob("*.sock"):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_PROBE_S)
            try:
                probe.connect(str(left))
            except ConnectionRefusedError:
                left.unlink()
    return directory
