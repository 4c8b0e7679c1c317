"""What one client can do to a server, for as long as it is let: python -m neighbours.hostile ADDRESS KIND HIDDEN_SIZE."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpc
from kt_expert_proto.header import FrameType, Op
from kt_expert_proto.v1 import session_pb2 as spb
from support.raw import RawMember


def reads_nothing(address: str) -> None:
    """Asks for as much as its credits allow, and takes no outcome."""
    with _member(address) as member:
        for _ in range(member.joined.credit_requests):
            member.send(*member.forward_frames(member.take_id()))
        time.sleep(3600)


def writes_slowly(address: str) -> None:
    """A request whose tensors never come to an end."""
    with _member(address) as member:
        header, opened, *_ = member.forward_frames(member.take_id())[0]
        member.send((header, opened))
        time.sleep(3600)


def acknowledges_nothing(address: str) -> None:
    """Takes outcomes, keeps quiet, is thrown out and comes back."""
    while True:
        with suppress(grpc.RpcError, AssertionError), _member(address) as member:
            while True:
                member.send(*member.call_frames(Op.ZERO_GRAD, spb.RequestOpen(zero_grad=spb.ZeroGrad())))
                member.outcome()


def sends_garbage(address: str) -> None:
    """Streams of bytes that are no frames."""
    rng = random.Random(1)  # noqa: S311
    while True:
        with suppress(grpc.RpcError, AssertionError), RawMember(address, "garbage", join=False) as member:
            member.send_bytes(rng.randbytes(1 << 16))
            member.stream_error()


def opens_without_end(address: str) -> None:
    """Runs without end, one after another, as many as are let in."""
    members: list[RawMember] = []
    while True:
        member = _member(address, join=False)
        with suppress(grpc.RpcError):
            member.join()
            members.append(member)
        if len(members) > 40:
            for each in members:
                each.__exit__()
            members.clear()


def asks_for_too_much(address: str) -> None:
    """Requests that are refused, as fast as they come."""
    with _member(address) as member:
        while True:
            request = member.take_id()
            member.ask([(member.header(FrameType.REQUEST, request, rows=1 << 20), member.forward_frames(request)[0][1])])


KINDS: dict[str, Callable[[str], None]] = {
    function.__name__: function
    for function in (
        reads_nothing, writes_slowly, acknowledges_nothing, sends_garbage, opens_without_end, asks_for_too_much,
    )
}  # fmt: skip
_NAMES: Iterator[str] = (f"hostile-{os.getpid()}-{number}" for number in range(1 << 30))


def _member(address: str, *, join: bool = True) -> RawMember:
    member = RawMember(address, next(_NAMES), join=join)
    member.hidden = int(sys.argv[3])
    return member


if __name__ == "__main__":
    os.nice(19)  # it would run on another machine
    KINDS[sys.argv[2]](sys.argv[1])
