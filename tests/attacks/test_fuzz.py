"""Hostile input in numbers: frames with random fields under a right checksum, and random bytes, into the real core."""

from __future__ import annotations

import random
import uuid
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import PREFIX_BYTES, FrameError, FrameType, Header, Op, Tensor, pack, pack_prefix
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_server.members.limits import Limits
from kt_expert_server.members.wire import check_instance
from simulation.disk import SimulatedDisk
from simulation.heap import EventHeap
from simulation.network import Connection, Faults
from simulation.server import ServerProcess as SimulatedServer
from simulation.training import Plan
from support.raw import RawMember
from support.server import ServerProcess
from support.tokens import bearer, write_tokens

SERVICE = pb.DESCRIPTOR.services_by_name["Expert"]
INPUTS = 100_000
LIVE_STREAMS = 20_000
CONTROL_CALLS = 80_000


class _Nobody:
    def on_message(self, message: bytes) -> None: ...
    def on_end(self, reason: str) -> None: ...


def frame(rng: random.Random, sequence: int, epoch: int) -> bytes:
    small = rng.choice((0, 1, 2, 3, 16, 1 << 16, (1 << 32) - 1))
    kinds = [kind for kind in FrameType if kind is not FrameType.JOIN]
    header = Header(
        rng.choice(kinds), rng.choice((0, 1, 2, 3, 4, 1 << 63)), rng.choice((0, 1, 9)), rng.choice(list(Op)),
        rng.choice(list(Tensor)), rng.choice(list(Dtype)), rng.choice((0, 3, small)), rng.choice((0, 2, 16, small)),
        rng.choice((0, 1, 5)), epoch if rng.random() < 0.95 else 99,
    )  # fmt: skip
    payload = rng.randbytes(rng.choice((0, 2, 8, 24, 192)))
    piece = pack(header, sequence, rng.choice((0, 0, 0, 8)), payload, checksum=True) + payload
    message = pack_prefix(PREFIX_BYTES + len(piece)) + piece
    if rng.random() < 0.1:
        message = rng.randbytes(len(message))
    return message


def test_a_hundred_thousand_frames_neither_crash_nor_leak() -> None:
    rng, heap = random.Random(1), EventHeap()
    server = SimulatedServer(heap, rng, SimulatedDisk(rng), Limits(), piece_bytes=1 << 20)
    server.start()
    plan = Plan(0, 0, 1, 1, 1, replay=False)
    count = streams = 0
    while count < INPUTS:
        connection = Connection(heap, rng, Faults, (_Nobody(), _Nobody()))
        stream = server.accept(connection)
        assert stream is not None
        streams += 1
        instance = check_instance(f"{rng.getrandbits(128):032x}")
        _join(server, stream, plan, instance, takeover=streams > 1)
        sequence = 1
        while not stream._is_over and count < INPUTS:
            stream.on_message(frame(rng, sequence, 1))
            while heap.next_time <= heap.now + 0.1:
                heap.step()
            sequence, count = sequence + 1, count + 1
        stream.on_end("done")
    assert server.core is not None
    for run in list(server.core.runs.by_name.values()):
        server.core.runs.close(run)
    assert server.pool.out == 0
    assert server.budget.total == 0
    assert streams > 1000


def _join(server: SimulatedServer, stream: object, plan: Plan, instance: str, *, takeover: bool) -> None:
    from kt_expert_proto.codec import Encoder
    from kt_expert_proto.v1.session_pb2 import Join

    join = Join(run="fuzz", config=plan.config(), rank=0, instance=instance, takeover=takeover)
    (message,) = Encoder().messages([(Header(FrameType.JOIN, epoch=1), join.SerializeToString())])
    stream.on_message(message)  # type: ignore[attr-defined]
    heap = server._heap
    while heap.next_time <= heap.now + 1.0:
        heap.step()


@pytest.fixture(scope="module")
def hostile_server(qwen3_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Takes calls as fast as they come, from somebody who may train and not administer."""
    directory = tmp_path_factory.mktemp("fuzz")
    tokens = write_tokens(directory / "tokens", attacker="train")
    options = ("--calls-per-second", "1e6", "--token-file", str(tokens), "--state-dir", str(directory / "state"))
    with ServerProcess(qwen3_checkpoint, directory / "log", *options) as process:
        yield process
        assert "Traceback" not in process.log.read_text(encoding="utf-8")


@pytest.mark.timeout(900)
def test_a_live_server_survives_hostile_streams(hostile_server: ServerProcess) -> None:
    rng = random.Random(2)
    codes = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS}
    with RawMember(hostile_server.address, f"fuzz-{uuid.uuid4().hex}", identity="attacker") as raw:
        for _ in range(LIVE_STREAMS):
            raw.rejoin(resume=False)
            for sequence in range(1, rng.randrange(2, 12)):
                raw.send_bytes(frame(rng, sequence, raw.epoch))
            raw.send_bytes(b"the end")
            try:
                assert raw.stream_error().code() in codes
            except FrameError as error:
                raise AssertionError("the server sent a malformed frame") from error
        raw.rejoin(resume=False)
        raw.leave()


def control_message(rng: random.Random, request: Any) -> bytes:
    """Random bytes, or a message with hostile text in it, whole or damaged."""
    if rng.random() < 0.2:
        return rng.randbytes(rng.randrange(200))
    message = request()
    for field in message.DESCRIPTOR.fields:
        text = rng.choice(("", "a", "../../etc/passwd", "\x00", "run\n", "\U0001f4a5" * 40, "a" * 5000, "fuzz"))
        setattr(message, field.name, text if field.type == field.TYPE_STRING else rng.getrandbits(31))
    encoded = bytearray(message.SerializeToString() + rng.randbytes(rng.choice((0, 0, 3))))
    for _ in range(rng.choice((0, 0, 1, 4))):
        if encoded:
            encoded[rng.randrange(len(encoded))] = rng.randrange(256)
    return bytes(encoded[: rng.randrange(len(encoded) + 1)] if rng.random() < 0.2 else encoded)


@pytest.mark.timeout(900)
def test_a_live_server_survives_hostile_control_calls(hostile_server: ServerProcess) -> None:
    rng, seen = random.Random(3), Counter[grpc.StatusCode]()
    metadata = bearer("attacker")
    with grpc.insecure_channel(hostile_server.address) as channel:
        waiting: deque[grpc.Future] = deque()
        methods = [
            (channel.unary_unary(f"/{SERVICE.full_name}/{method.name}"), getattr(pb, method.input_type.name))
            for method in SERVICE.methods
        ]
        for _ in range(CONTROL_CALLS):
            call, request = rng.choice(methods)
            waiting.append(call.future(control_message(rng, request), metadata=metadata, timeout=60.0))
            if len(waiting) > 32:
                seen[waiting.popleft().code()] += 1
        seen.update(call.code() for call in waiting)
    assert {code.name for code in seen} == {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED"}
