"""Hostile input in numbers: frames with random fields under a right checksum, and random bytes, into the real core."""

from __future__ import annotations

import random
import uuid

import grpc
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import PREFIX, FrameError, FrameType, Header, Op, Tensor, pack
from kt_expert_server.members.limits import Limits
from kt_expert_server.members.wire import check_instance
from simulation.disk import SimulatedDisk
from simulation.heap import EventHeap
from simulation.network import Connection, Faults
from simulation.server import ServerProcess as SimulatedServer
from simulation.training import Plan
from support.raw import RawMember
from support.server import ServerProcess

INPUTS = 100_000
LIVE_STREAMS = 300


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
    message = PREFIX.pack(PREFIX.size + len(piece)) + piece
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


def test_a_live_server_survives_hostile_streams(server: ServerProcess) -> None:
    rng = random.Random(2)
    codes = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.DATA_LOSS}
    with RawMember(server.address, f"fuzz-{uuid.uuid4().hex}") as raw:
        for _ in range(LIVE_STREAMS):
            raw.rejoin(resume=False)
            for sequence in range(1, 40):
                raw.send_bytes(frame(rng, sequence, raw.epoch))
            raw.send_bytes(b"the end")
            try:
                assert raw.stream_error().code() in codes
            except FrameError as error:
                raise AssertionError("the server sent a malformed frame") from error
        raw.rejoin(resume=False)
        raw.leave()
