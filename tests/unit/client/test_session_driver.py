"""The session's threads and locks, on a transport that is driven by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest
from kt_expert_client.errors import DeadlineExceeded, KtExpertError, NotFound
from kt_expert_client.session import inflight
from kt_expert_client.session.actions import JoinTerms
from kt_expert_client.session.calls import Call
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.driver import Session
from kt_expert_client.session.journal import Journal
from kt_expert_client.wire.base import Receiver
from kt_expert_proto.codec import Outbound
from kt_expert_proto.header import FrameType, Header, Op
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from support.waiting import wait_until


class Wire:
    """Implements Transport. Answers a JOIN, and else nothing that it is not told to."""

    def __init__(self, answers: bool = True) -> None:
        self.answers = answers
        self.sent: list[Header] = []
        self.receiver: Receiver | None = None

    def open(self, receiver: Receiver) -> Wire:
        self.receiver = receiver
        return self

    def send(self, frames: Sequence[Outbound]) -> None:
        for header, _ in frames:
            self._take(header)

    def _take(self, header: Header) -> None:
        self.sent.append(header)
        if header.type is FrameType.JOIN and self.answers:
            self.say(
                FrameType.JOINED, spb.Joined(credit_requests=1, credit_bytes=1000, born=1).SerializeToString(), header.epoch
            )
        if header.op is Op.LEAVE:
            self.result(header)

    def close(self) -> None:
        pass

    def say(self, kind: FrameType, payload: bytes, epoch: int, request_id: int = 0) -> None:
        assert self.receiver is not None
        header, receiver = Header(kind, request_id, epoch=epoch), self.receiver
        threading.Thread(target=receiver.deliver, args=(header, payload)).start()

    def result(self, request: Header) -> None:
        self.say(FrameType.RESULT, spb.ResultHead().SerializeToString(), request.epoch, request.request_id)


def session_on(wire: Wire) -> Session:
    terms = JoinTerms("run", pb.RunConfig(world_size=1), False, 0, "a" * 32)
    core = SessionCore(terms, Journal(0), lambda size, call: None, time.monotonic(), 60.0)  # type: ignore[arg-type,return-value]
    return Session(core, wire.open, "test")


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.endswith("-test")]


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    wait_until(lambda: not names(), what="the session's threads to end")


def zero_grad(timeout_s: float = 60.0) -> Call:
    return Call(Op.ZERO_GRAD, spb.RequestOpen(zero_grad=spb.ZeroGrad()), timeout_s)


def test_a_session_that_cannot_join_leaves_nothing_behind() -> None:
    wire = Wire(answers=False)
    with pytest.raises(DeadlineExceeded, match=r"not joined within 0\.1 s"):
        session_on(wire).start(0.1)


def test_an_interrupted_join_gives_the_rank_back(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire()
    session = session_on(wire)
    wait = session._wait_until_joined

    def interrupted(timeout_s: float) -> None:
        wait(timeout_s)
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_wait_until_joined", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.start(60.0)
    assert [header.op for header in wire.sent if header.type is FrameType.REQUEST] == [Op.LEAVE]


def test_a_late_outcome_of_a_call_that_was_given_up_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflight, "ANSWER_SLACK_S", 0.0)
    wire = Wire()
    session = session_on(wire)
    session.start(60.0)
    with pytest.raises(DeadlineExceeded):
        session.submit(zero_grad(timeout_s=0.01)).wait()
    done = threading.Event()

    def submit() -> None:
        session.submit(zero_grad())  # waits: the server works on the other still
        done.set()

    thread = threading.Thread(target=submit)
    thread.start()
    assert not done.wait(0.1)
    (first,) = [header for header in wire.sent if header.type is FrameType.REQUEST]
    wire.result(first)
    assert done.wait(10.0)
    thread.join()
    session.close()


def test_a_fault_of_the_clients_own_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = Wire()
    session = session_on(wire)
    session.start(60.0)
    pending = session.submit(zero_grad())

    def broken(now: float) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(session.core, "tick", broken)
    with session._lock:
        session._clock.notify()
    with pytest.raises(KtExpertError, match=r"a fault of the client's own.*a bug"):
        pending.wait(30.0)


def test_the_end_is_told_to_those_who_wait_for_credits() -> None:
    wire = Wire()
    session = session_on(wire)
    session.start(60.0)
    session.submit(zero_grad())
    errors: list[KtExpertError] = []

    def submit() -> None:
        try:
            session.submit(zero_grad())
        except KtExpertError as error:
            errors.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    assert wire.receiver is not None
    wire.receiver.on_end(NotFound("the run was closed", is_answer=True))
    thread.join(30.0)
    assert [type(error) for error in errors] == [NotFound]
