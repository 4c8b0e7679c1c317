"""The trainer's core and its journal, event by event."""

from __future__ import annotations

import pytest
from kt_expert_client.errors import AlreadyExists, DeadlineExceeded, NotFound, OutOfCapacity, RunStateLost, ServerUnavailable
from kt_expert_client.session.actions import Action, Connect, Disconnect, JoinTerms, Phase, Send, Settled
from kt_expert_client.session.calls import Call
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.inflight import ANSWER_SLACK_S
from kt_expert_client.session.journal import Journal
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameError, FrameType, Header, Op, Tensor
from kt_expert_proto.lora import LayerLora
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from support.adapters import ACTIVE, GRADIENTS, targets

TERMS = JoinTerms("run", pb.RunConfig(world_size=1), False, 0, "a" * 32)


class Bytes:
    """Implements Buffer."""

    def __init__(self, content: bytes) -> None:
        self.view = memoryview(bytearray(content))

    def release(self) -> None:
        self.view = memoryview(bytearray())


class Trainer:
    """Drives a core by hand; what it does is collected by kind."""

    def __init__(self, replay_bytes: int = 0) -> None:
        self.journal = Journal(replay_bytes)
        self.core = SessionCore(TERMS, self.journal, lambda size, call: None, 0.0, join_timeout_s=60.0)  # type: ignore[arg-type]
        self.epoch = 0

    def actions(self) -> list[Action]:
        return self.core.take_actions()

    def sent(self) -> list[tuple[str, int]]:
        return [(each.header.type.name, each.header.request_id) for each in self.actions() if isinstance(each, Send)]

    def settled(self) -> list[Settled]:
        return [each for each in self.actions() if isinstance(each, Settled)]

    def connect(self, now: float = 0.0) -> spb.Join:
        self.core.tick(now)
        connect, send = self.actions()
        assert isinstance(connect, Connect)
        assert isinstance(send, Send)
        self.epoch = send.header.epoch
        return spb.Join.FromString(send.payload)  # type: ignore[arg-type]

    def joined(self, now: float = 0.0, **fields: object) -> None:
        answer = spb.Joined(**{"credit_requests": 4, "credit_bytes": 1000, "born": 1} | fields)  # type: ignore[arg-type]
        self.core.received(Header(FrameType.JOINED, epoch=self.epoch), answer.SerializeToString(), now)

    def result(self, request_id: int, now: float = 0.0, **fields: object) -> None:
        head = spb.ResultHead(**fields)  # type: ignore[arg-type]
        self.core.received(Header(FrameType.RESULT, request_id, epoch=self.epoch), head.SerializeToString(), now)

    def submit(self, op: Op, timeout_s: float = 100.0, now: float = 0.0, **fields: object) -> Call:
        call = Call(op, spb.RequestOpen(**fields), timeout_s)  # type: ignore[arg-type]
        self.core.submit(call, now)
        return call


LORA = LayerLora(0, rank_down=4, scale_down=1.0)
STEP = spb.Step(step=1, groups=[pb.ParamGroup(sets=GRADIENTS)])


def forward(trainer: Trainer, *, adapter: bool = True) -> Call:
    return trainer.submit(Op.FORWARD, forward=spb.Forward(save_for_backward=True, adapters=ACTIVE if adapter else ()))


def backward(trainer: Trainer, ticket: int, *, begin: bool = False) -> Call:
    return trainer.submit(Op.BACKWARD, backward=spb.Backward(ticket=ticket, targets=targets(LORA, replaced=begin)))


def connected(replay_bytes: int = 0) -> Trainer:
    trainer = Trainer(replay_bytes)
    trainer.connect()
    trainer.joined(created=True)
    trainer.actions()
    return trainer


def train_one_step(trainer: Trainer, first_id: int, step: int) -> None:
    ticket = forward(trainer).request_id
    assert ticket == first_id
    trainer.result(ticket)
    backward(trainer, ticket, begin=True)
    trainer.result(first_id + 1)
    trainer.submit(Op.STEP, step=spb.Step(step=step))
    trainer.result(first_id + 2, step=step)
    trainer.actions()


def test_a_call_goes_out_and_its_outcome_is_acknowledged() -> None:
    trainer = connected()
    call = trainer.submit(Op.ZERO_GRAD, zero_grad=spb.ZeroGrad())
    assert trainer.sent() == [("REQUEST", 1)]
    trainer.result(1, step=7)
    actions = trainer.actions()
    assert [type(each) for each in actions] == [Send, Settled]
    assert call.head is not None
    assert call.head.step == 7


def test_outcomes_out_of_order_are_refused() -> None:
    trainer = connected()
    for _ in range(2):
        trainer.submit(Op.ZERO_GRAD, zero_grad=spb.ZeroGrad())
    with pytest.raises(FrameError, match="an outcome of request 2 came, expected that of 1"):
        trainer.result(2)
    with pytest.raises(FrameError, match="frame of epoch 9 on a stream of epoch 1"):
        trainer.core.received(Header(FrameType.RESULT, 1, epoch=9), b"", 0.0)


def test_after_a_cut_only_what_the_server_lacks_is_sent_again() -> None:
    trainer = connected()
    for _ in range(3):
        trainer.submit(Op.ZERO_GRAD, zero_grad=spb.ZeroGrad())
    trainer.actions()
    trainer.core.disconnected(ServerUnavailable("cut"), 1.0)
    trainer.actions()
    join = trainer.connect(1.0)
    assert (join.acknowledged, join.born, trainer.epoch) == (0, 1, 2)
    trainer.joined(1.0, resumed=True, received=2)
    assert trainer.sent() == [("REQUEST", 3)]
    for request_id in (1, 2, 3):
        trainer.result(request_id)
    assert len(trainer.settled()) == 3


def test_attempts_are_further_and_further_apart() -> None:
    trainer = connected()
    now, delays = 10.0, []
    for _ in range(12):
        trainer.core.disconnected(ServerUnavailable("down"), now)
        trainer.actions()
        deadline = trainer.core.next_deadline()
        assert deadline is not None
        delays.append(round(deadline - now, 6))
        now = deadline
        trainer.connect(now)
    assert delays[0] == 0.0
    assert delays == sorted(delays)
    assert delays[-1] == 5.0


def test_the_first_join_waits_as_the_server_says_and_then_gives_up() -> None:
    trainer = Trainer()
    trainer.connect()
    held = AlreadyExists("held", retry_delay_s=20.0, is_answer=True)
    trainer.core.disconnected(held, 0.0)
    assert trainer.core.next_deadline() == 20.0
    trainer.connect(20.0)
    trainer.core.disconnected(AlreadyExists("held", retry_delay_s=50.0, is_answer=True), 20.0)
    assert isinstance(trainer.core.failure, AlreadyExists)
    assert trainer.core.phase is Phase.ENDED


@pytest.mark.parametrize(("error", "ends"), [
    (NotFound("closed", is_answer=True), True),
    (NotFound("a proxy's page"), False),
    (AlreadyExists("held", retry_delay_s=5.0, is_answer=True), True),
    (ServerUnavailable("draining", is_answer=True), False),
    (OutOfCapacity("too many streams", is_answer=True), False),
    (ServerUnavailable("cut"), False),
])  # fmt: skip
def test_only_the_servers_own_word_is_final(error: Exception, ends: bool) -> None:
    trainer = connected()
    trainer.core.disconnected(error, 1.0)  # type: ignore[arg-type]
    assert (trainer.core.failure is not None) == ends


def test_an_overdue_call_is_given_up_and_its_outcome_still_acknowledged() -> None:
    trainer = connected()
    trainer.submit(Op.GRAD_NORM, timeout_s=10.0, grad_norm=spb.GradNorm())
    trainer.actions()
    trainer.core.tick(10.0 + ANSWER_SLACK_S)
    settled, cancel, probe = trainer.actions()
    assert isinstance(settled, Settled)
    assert isinstance(settled.error, DeadlineExceeded)
    assert isinstance(cancel, Send)
    assert cancel.header.type is FrameType.CANCEL
    assert isinstance(probe, Send)
    assert probe.header.type is FrameType.ACK
    trainer.result(1, now=20.0)
    assert trainer.sent() == [("ACK", 1)]


def test_a_call_given_up_without_a_connection_is_not_sent_later() -> None:
    trainer = connected()
    trainer.core.disconnected(ServerUnavailable("cut"), 1.0)
    trainer.submit(Op.GRAD_NORM, timeout_s=10.0, now=1.0, grad_norm=spb.GradNorm())
    trainer.core.tick(1.0)
    trainer.core.disconnected(ServerUnavailable("down"), 2.0)
    trainer.core.tick(11.0 + ANSWER_SLACK_S)
    (settled,) = trainer.settled()
    assert isinstance(settled.error, ServerUnavailable)
    assert "there has been no connection for 15 s (down)" in str(settled.error)
    if trainer.core.phase is not Phase.JOINING:
        trainer.connect(20.0)
    trainer.epoch = trainer.core._epoch
    trainer.joined(20.0, resumed=True, received=0)
    assert ("REQUEST", 1) not in trainer.sent()


def test_a_loss_is_told_once_the_rank_is_given_back() -> None:
    trainer = connected()
    train_one_step(trainer, 1, 1)
    waiting = trainer.submit(Op.GRAD_NORM, grad_norm=spb.GradNorm())
    trainer.core.disconnected(ServerUnavailable("killed"), 1.0)
    trainer.actions()
    trainer.connect(1.0)
    trainer.joined(1.0, created=True)
    assert trainer.sent() == [("REQUEST", 5)]  # the farewell
    trainer.result(5, now=1.0)
    actions = trainer.actions()
    (settled,) = [each for each in actions if isinstance(each, Settled)]
    assert settled.call is waiting
    assert isinstance(settled.error, RunStateLost)
    assert settled.error.step == 0
    assert any(isinstance(each, Disconnect) for each in actions)


def test_what_the_server_lost_is_repeated_from_the_journal() -> None:
    trainer = connected(replay_bytes=1 << 20)
    train_one_step(trainer, 1, 1)
    train_one_step(trainer, 4, 2)
    waiting = forward(trainer)
    trainer.core.disconnected(ServerUnavailable("killed"), 1.0)
    trainer.actions()
    trainer.connect(1.0)
    trainer.joined(1.0, included=3, step=1)  # a checkpoint after the first step
    assert trainer.sent() == [("REQUEST", each) for each in (4, 5, 6, 7)]
    for request_id in (4, 5, 6):
        trainer.result(request_id)
    assert not trainer.settled()
    trainer.result(7)
    assert [each.call for each in trainer.settled()] == [waiting]


def test_an_idle_trainer_at_a_steps_end_loses_nothing() -> None:
    trainer = connected()
    train_one_step(trainer, 1, 1)
    trainer.core.disconnected(ServerUnavailable("restarted"), 1.0)
    trainer.actions()
    trainer.connect(1.0)
    trainer.joined(1.0, included=3, step=1, durable=3)
    assert trainer.core.failure is None


def test_a_step_whose_outcome_was_lost_with_its_member_is_known_from_the_state() -> None:
    trainer = connected()
    ticket = forward(trainer).request_id
    trainer.result(ticket)
    backward(trainer, ticket, begin=True)
    trainer.result(2)
    step = trainer.submit(Op.STEP, timeout_s=10_000.0, step=spb.Step(step=1))
    trainer.core.disconnected(ServerUnavailable("paused"), 1.0)
    trainer.actions()
    trainer.connect(2000.0)
    trainer.joined(2000.0, included=3, step=1)
    assert [each.call for each in trainer.settled()] == [step]
    assert step.head is not None
    assert step.head.step == 1
    assert trainer.core.failure is None


def test_a_state_of_another_step_is_not_taken_for_the_one_a_trainer_came_to() -> None:
    trainer = Trainer()
    trainer.connect()
    trainer.joined(step=4)
    trainer.core.disconnected(ServerUnavailable("killed"), 1.0)
    trainer.actions()
    trainer.connect(1.0)
    trainer.joined(1.0, step=2)
    trainer.core.disconnected(ServerUnavailable("gone"), 1.0)
    assert isinstance(trainer.core.failure, RunStateLost)
    assert trainer.core.failure.step == 2


def killed_and_back(trainer: Trainer, now: float = 1.0, **fields: object) -> None:
    trainer.core.disconnected(ServerUnavailable("killed"), now)
    trainer.actions()
    trainer.connect(now)
    trainer.joined(now, **fields)


def test_a_repetition_that_fails_ends_the_session_and_settles_nothing_twice() -> None:
    trainer = connected(replay_bytes=1 << 20)
    train_one_step(trainer, 1, 1)
    waiting = forward(trainer)
    killed_and_back(trainer)
    trainer.actions()
    detail = spb.ErrorDetail(code=9, message="another window").SerializeToString()
    trainer.core.received(Header(FrameType.ERROR, 1, epoch=trainer.epoch), detail, 1.0)
    for request_id in (2, 3, 4, 5):
        trainer.result(request_id)
    (told,) = trainer.settled()
    assert told.call is waiting
    assert isinstance(told.error, RunStateLost)
    assert "could not be repeated: another window" in str(told.error)


def test_a_repetition_has_results_of_its_own() -> None:
    trainer = connected(replay_bytes=1 << 20)
    opened = spb.RequestOpen(forward=spb.Forward(save_for_backward=True, adapters=ACTIVE))
    call = Call(Op.FORWARD, opened, 100.0, expects={Tensor.OUTPUT: 4})
    trainer.core.submit(call, 0.0)

    def output(content: bytes) -> None:
        header = Header(FrameType.TENSOR, 1, tensor=Tensor.OUTPUT, rows=1, columns=1, dtype=Dtype.FP32, epoch=trainer.epoch)
        trainer.result(1)
        trainer.core.admit(header)
        trainer.core.received(header, Bytes(content), 0.0)

    output(b"1234")
    (first,) = trainer.settled()
    killed_and_back(trainer)
    assert trainer.sent() == [("REQUEST", 1)]
    output(b"5678")
    assert not trainer.settled()
    assert bytes(first.results[Tensor.OUTPUT].view) == b"1234"


def test_a_ticket_released_while_its_forward_is_repeated() -> None:
    trainer = connected(replay_bytes=1 << 20)
    let_go: list[int] = []
    opened = spb.RequestOpen(forward=spb.Forward(save_for_backward=True, adapters=ACTIVE))
    call = Call(Op.FORWARD, opened, 100.0, on_unneeded=lambda call: let_go.append(call.request_id))
    trainer.core.submit(call, 0.0)
    trainer.result(1)
    killed_and_back(trainer)
    trainer.core.release(1)
    trainer.actions()
    assert not let_go  # its tensors are still being sent
    trainer.result(1)
    assert ("RELEASE", 1) in trainer.sent()
    assert let_go == [1]


def test_a_repetition_has_time_whatever_its_caller_had_left() -> None:
    trainer = connected(replay_bytes=1 << 20)
    trainer.submit(Op.SET_STEP, timeout_s=0.001, set_step=spb.SetStep(step=3))
    trainer.result(1)
    trainer.core.disconnected(ServerUnavailable("killed"), 1.0)
    trainer.actions()
    trainer.connect(1.0)
    trainer.joined(1.0)
    (request,) = [each for each in trainer.actions() if isinstance(each, Send)]
    assert request.header.deadline_ms > 60_000


def test_while_an_outcome_is_waited_for_a_probe_shows_whether_messages_arrive() -> None:
    trainer = connected()
    trainer.core.tick(1000.0)
    assert not trainer.actions()  # nothing is waited for
    trainer.submit(Op.ZERO_GRAD, now=1000.0, timeout_s=300.0, zero_grad=spb.ZeroGrad())
    assert trainer.sent() == [("REQUEST", 1)]
    for _ in range(3):
        due = trainer.core.next_deadline()
        assert due is not None
        trainer.core.tick(due - 0.1)
        assert not trainer.actions()
        trainer.core.tick(due)
        assert trainer.sent() == [("ACK", 0)]
        trainer.core.received(Header(FrameType.ACK, 0, epoch=trainer.epoch), b"", due)
    trainer.result(1)
    trainer.actions()
    trainer.core.tick(2000.0)
    assert not trainer.actions()


def test_a_server_that_lost_what_it_had_called_durable_cannot_be_brought_back() -> None:
    trainer = connected(1 << 20)
    train_one_step(trainer, 1, 1)
    train_one_step(trainer, 4, 2)
    trainer.submit(Op.GRAD_NORM, grad_norm=spb.GradNorm())
    trainer.result(7, durable=6)  # what led there is not kept
    killed_and_back(trainer, included=3, step=1, durable=3)
    assert not [each for each in trainer.actions() if isinstance(each, Send) and each.header.op is Op.FORWARD]
    trainer.core.disconnected(ServerUnavailable("gone"), 2.0)
    assert isinstance(trainer.core.failure, RunStateLost)
    assert trainer.core.failure.step == 1


def test_a_ticket_of_an_older_adapter_is_no_loss() -> None:
    trainer = connected()
    forward(trainer)
    trainer.result(1)
    trainer.submit(Op.STEP, step=STEP)
    trainer.result(2, step=1, durable=2)
    killed_and_back(trainer, included=2, step=1, durable=2)
    assert trainer.core.failure is None
    assert not [each for each in trainer.sent() if each[0] == "REQUEST"]


def refused(trainer: Trainer, request_id: int, now: float, delay_ms: int = 2000) -> None:
    detail = spb.ErrorDetail(code=8, message="full", retry_delay_ms=delay_ms).SerializeToString()
    trainer.core.received(Header(FrameType.ERROR, request_id, epoch=trainer.epoch), detail, now)


def test_a_call_the_server_has_no_memory_for_is_asked_for_again_when_it_says() -> None:
    trainer = connected()
    call = forward(trainer)
    trainer.actions()
    refused(trainer, 1, now=10.0)
    assert trainer.sent() == [("ACK", 1)]
    assert trainer.core.next_deadline() == 12.0
    trainer.core.tick(11.9)
    assert not trainer.sent()
    trainer.core.tick(12.0)
    assert trainer.sent() == [("REQUEST", 2)]
    trainer.result(2)
    (told,) = trainer.settled()
    assert (told.call, told.error, call.request_id) == (call, None, 2)


def test_a_refused_call_is_told_where_asking_again_would_not_do() -> None:
    trainer = connected()
    forward(trainer)
    forward(trainer)  # came after it, and may count on it
    refused(trainer, 1, now=10.0)
    (told,) = trainer.settled()
    assert isinstance(told.error, OutOfCapacity)
    refused(trainer, 2, now=10.0, delay_ms=0)  # the server names no time
    assert len(trainer.settled()) == 1
    forward(trainer)
    refused(trainer, 3, now=99.0)  # its time is up before that
    assert len(trainer.settled()) == 1


@pytest.mark.parametrize("end", ["cancel", "close", "cut"])
def test_a_call_that_waits_for_memory_ends_as_others_do(end: str) -> None:
    trainer = connected()
    call = forward(trainer)
    refused(trainer, 1, now=10.0)
    trainer.actions()
    if end == "cancel":
        trainer.core.cancel(call)
    elif end == "close":
        trainer.core.end(ServerUnavailable("closed"))
    else:
        trainer.core.disconnected(ServerUnavailable("cut"), 11.0)
        trainer.actions()
        trainer.connect(11.0)
        trainer.joined(11.0, resumed=True, received=1)
        trainer.core.tick(12.0)
        assert ("REQUEST", 2) in trainer.sent()
        return
    (told,) = trainer.settled()
    assert told.error is not None
    trainer.core.tick(12.0)
    assert not trainer.sent()


def settled(journal: Journal, request_id: int, op: Op, **fields: object) -> Call:
    call = Call(op, spb.RequestOpen(**fields), 1.0, request_id=request_id)  # type: ignore[arg-type]
    journal.settled(call)
    return call


def test_the_journal_keeps_what_is_needed_and_no_more() -> None:
    journal = Journal(1 << 20)
    saved = spb.Forward(save_for_backward=True, adapters=ACTIVE)
    settled(journal, 1, Op.FORWARD, forward=saved)
    settled(journal, 2, Op.BACKWARD, backward=spb.Backward(ticket=1, targets=targets(LORA)))
    assert journal.lost(0)
    settled(journal, 3, Op.FORWARD, forward=saved)
    settled(journal, 4, Op.BACKWARD, backward=spb.Backward(ticket=3, targets=targets(LORA, replaced=True)))
    assert [call.request_id for call in journal.to_repeat(0)] == [3, 4]  # the first window does not count any more
    settled(journal, 5, Op.FORWARD, forward=saved)
    settled(journal, 6, Op.ZERO_GRAD, zero_grad=spb.ZeroGrad())
    assert [call.request_id for call in journal.to_repeat(0)] == [5]
    journal.released(5)
    assert not journal.to_repeat(0)
    assert not journal.lost(0)
    settled(journal, 7, Op.STEP, step=STEP)
    assert (journal.lost(6), journal.lost(7)) == (True, False)
    journal.durable(7)
    assert not journal.to_repeat(0)


def test_the_journal_keeps_a_forward_whose_backward_does_not_survive() -> None:
    journal = Journal(1 << 20)
    settled(journal, 1, Op.FORWARD, forward=spb.Forward(save_for_backward=True))
    settled(journal, 2, Op.STEP, step=STEP)
    journal.durable(2)
    settled(journal, 3, Op.BACKWARD, backward=spb.Backward(ticket=1, targets=targets(LORA)))
    journal.durable(2)
    assert [call.request_id for call in journal.to_repeat(2)] == [1, 3]


def test_a_journal_that_overflows_says_so_until_a_checkpoint_covers_it() -> None:
    journal = Journal(1)
    for request_id in (1, 2):
        call = Call(Op.STEP, spb.RequestOpen(step=spb.Step(step=1)), 1.0, request_id=request_id)
        call.expects = {}
        journal.settled(call)
    assert journal.can_repeat(0)  # steps weigh nothing
    heavy = Call(Op.WRITE_TENSOR, spb.RequestOpen(), 1.0, request_id=3)
    heavy.expects = {0: 10}  # type: ignore[dict-item]
    journal.settled(heavy)
    assert journal.overflowed
    assert not journal.can_repeat(2)
    journal.durable(3)
    assert not journal.overflowed
    assert journal.can_repeat(3)
