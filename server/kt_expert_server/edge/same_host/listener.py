"""The unix socket that trainers on this host come to."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import stat
import struct
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import kt_expert_native as native
from kt_expert_proto.handshake import ACCEPTED, CHALLENGE_BYTES, GREETING_BYTES, PROOF_BYTES, is_proof, proof
from kt_expert_proto.same_host import CONTROL_BYTES, MAGIC, MAX_PATH_BYTES

from kt_expert_server.edge.accepting import BACKLOG, Acceptor, Parts
from kt_expert_server.edge.entrance import Caller
from kt_expert_server.edge.offers import Offer, Offers
from kt_expert_server.edge.same_host.memory import SharedMemory
from kt_expert_server.edge.socket_stream import SocketStream
from kt_expert_server.edge.sockets import PlainWire, receive, refuse
from kt_expert_server.engine.fast_path import GrantedForwards
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import ListenError, NotAuthenticated, NotPermitted, OutOfCapacity, ServerError

_METHOD = "SameHost"
_PROBE_S = 1.0  # for a server of another process to take a connection
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: process, user, group
_ROOT = 0
_FULL_REGION_BYTES = 128 * 1024 * 1024  # each way: two large batches in flight and the outcomes of two more
_LEAST_REGION_BYTES = 1024 * 1024
_ENTRY_BITS = 62  # of a connection's first entry; numbers go up from there
_FAST_BYTES = 2 * native.FAST_PAYLOAD_BYTES  # a small forward and its answer
_PART_OF_LIMIT = 32  # a region takes at most this part of the server's memory limit


def region_bytes(limit_bytes: int) -> int:
    """Of each direction of one trainer's shared memory, whole pages. 0 where the server has too little memory for it."""
    size = min(_FULL_REGION_BYTES, limit_bytes // _PART_OF_LIMIT // CONTROL_BYTES * CONTROL_BYTES)
    return size if size >= _LEAST_REGION_BYTES else 0


class SameHost:
    """Listens in a directory of its user's own. Used from the event loop's thread."""

    def __init__(self, directory: Path, parts: Parts, spin_s: float = 0.0) -> None:
        """`spin_s`: how long the server looks for a small forward before it sleeps. Raises ListenError for a directory that
        others can write to, or that cannot be made."""
        self._parts, self._spin_s = parts, spin_s
        self._region_bytes = region_bytes(parts.budget.limit_bytes)
        self.path = _prepare(directory) / f"{secrets.token_hex(8)}.sock"
        if len(os.fsencode(self.path)) > MAX_PATH_BYTES:
            raise ListenError(f"--same-host {directory}: a socket's path has at most {MAX_PATH_BYTES} bytes, got {self.path}")
        self._offers = Offers(MAGIC)
        self._acceptor = Acceptor(_METHOD, parts.metrics, self._serve)

    def start(self) -> None:
        """Raises ListenError."""
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            listening.bind(str(self.path))
            self.path.chmod(stat.S_IRUSR | stat.S_IWUSR)
            listening.listen(BACKLOG)
        except OSError as error:
            listening.close()
            raise ListenError(f"cannot listen on unix:{self.path}: {error.strerror}") from error
        self._acceptor.start(listening)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more connections, gives those that are there so long to end, and removes the socket. Safe to call twice."""
        await self._acceptor.stop(grace_s)
        self.path.unlink(missing_ok=True)

    def offer(self, caller: Caller) -> Offer:
        return self._offers.make(caller)

    async def _serve(self, connection: socket.socket) -> None:
        wire = PlainWire(connection, has_checksums=True)  # memory of one machine is not a network
        try:
            _check_user(connection)
            async with self._acceptor.greeting():
                greeting = await receive(wire, GREETING_BYTES)
            offer = self._offers.take(greeting)
            await self._share(wire, offer, greeting)
        except ServerError as error:
            refuse(wire, str(error))
            raise

    async def _share(self, wire: PlainWire, offer: Offer, greeting: bytes) -> None:
        """Makes the memory, hands it over, and carries the stream. Raises NotAuthenticated, OutOfCapacity."""
        if not self._region_bytes:
            raise OutOfCapacity("the server's memory limit leaves no room for memory that trainers share")
        size = CONTROL_BYTES + 2 * self._region_bytes + _FAST_BYTES
        held = self._parts.budget.reserve(Kind.SHARED, size, offer.caller.identity, "memory that a trainer on this host shares")
        with ExitStack() as whole:
            whole.callback(held.release)
            here, there = _pair()
            whole.enter_context(here)
            with there, closing(_made(self._region_bytes)) as memory:
                async with self._acceptor.greeting():
                    await _hand_over(wire, memory, there, offer, greeting)
            await self._stream(wire, memory, here, offer.caller)

    async def _stream(self, wire: PlainWire, memory: SharedMemory, fast_end: socket.socket, caller: Caller) -> None:
        parts = self._parts
        first_entry = 1 + secrets.randbits(_ENTRY_BITS)
        fast = GrantedForwards(parts.engine, parts.gate, parts.budget, fast_end.fileno(), self._spin_s, first_entry)
        fast_end.detach()  # it is closed with what has it now
        try:
            await SocketStream(parts, caller, wire, memory, fast).run()
        finally:
            fast.report(parts.metrics)
            await asyncio.get_running_loop().run_in_executor(None, fast.stop)


def _pair() -> tuple[socket.socket, socket.socket]:
    """Two ends for small forwards. Raises OutOfCapacity where the system gives none."""
    try:
        return socket.socketpair()
    except OSError as error:
        raise OutOfCapacity(f"a socket for small forwards could not be made: {error.strerror}") from error


def _made(region_bytes: int) -> SharedMemory:
    """Raises OutOfCapacity where the system gives none."""
    try:
        return SharedMemory(region_bytes)
    except OSError as error:
        raise OutOfCapacity(f"memory to share could not be made: {error.strerror}") from error


async def _hand_over(
    wire: PlainWire, memory: SharedMemory, fast_end: socket.socket, offer: Offer, greeting: bytes
) -> None:  # fmt: skip
    """Sends the memory, and the trainer's end for small forwards, with the server's proof, and takes the trainer's. Raises
    NotAuthenticated."""
    answer = ACCEPTED + proof(offer.secret, b"server", greeting[-CHALLENGE_BYTES:])
    socket.send_fds(wire.socket, [answer], [memory.descriptor, fast_end.fileno()])  # an empty socket takes so little at once
    given = await receive(wire, PROOF_BYTES)
    if not is_proof(given, offer.secret, b"client", memory.nonce):
        raise NotAuthenticated("the trainer has not shown that it sees this server's memory")


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
