"""Small passes of several members in one pass over the weights, and how long one waits for another."""

from __future__ import annotations

import numpy as np
import pytest
from kt_expert_proto.header import FrameType, Op, Tensor
from kt_expert_server.engine.together import SharedPass
from kt_expert_server.members.scheduler import SHARED_TOKENS, SHARED_TOKENS_EACH
from simulation.model import TOKENS
from support.core import CoreMember, CoreServer

PASS_S = 0.040  # of the engine, in these tests
TURN_S = 0.002  # from an outcome to the trainer's next request


def busy_server(count: int) -> tuple[CoreServer, list[CoreMember]]:
    """What members ask for waits until finish()."""
    server = CoreServer()
    joined = [CoreMember(server, f"run{number}") for number in range(count)]
    server.holds_engine = True
    return server, joined


def shared_by(server: CoreServer) -> int:
    """How many batches the work that the engine has next is of."""
    work = server.works[0].work
    return len(work.pieces) if isinstance(work, SharedPass) else 1


def output(member: CoreMember, request_id: int) -> bytes:
    (found,) = [
        content
        for header, content in member.frames
        if header.request_id == request_id and header.type is FrameType.TENSOR and header.tensor is Tensor.OUTPUT
    ]
    return found


def finish(server: CoreServer, seconds: float = PASS_S) -> None:
    server.now += seconds
    assert server.work_once()


def test_what_waits_for_one_layer_is_computed_together_with_the_bits_of_each_alone() -> None:
    server, (first, *others) = busy_server(4)
    tokens = (TOKENS, 2 * TOKENS, TOKENS)
    begun = first.forward()
    asked = [member.forward(size, of=number) for number, (member, size) in enumerate(zip(others, tokens, strict=True))]
    finish(server)
    assert shared_by(server) == len(others)
    finish(server)
    assert first.has_outcome(begun)
    alone = CoreServer()
    for number, (member, request_id, size) in enumerate(zip(others, asked, tokens, strict=True)):
        lone = CoreMember(alone, f"alone{number}")
        assert output(member, request_id) == output(lone, lone.forward(size, of=number))


def test_their_backwards_are_too_and_tickets_are_each_ones_own() -> None:
    server, three = busy_server(3)
    server.holds_engine = False
    tickets = [member.forward() for member in three]
    for member, ticket in zip(three, tickets, strict=True):
        assert member.take(ticket) == ""
    server.holds_engine = True
    backwards = [member.backward(ticket) for member, ticket in zip(three, tickets, strict=True)]
    finish(server)
    assert shared_by(server) == 2
    finish(server)
    for member, ticket, backward in zip(three, tickets, backwards, strict=True):
        assert member.take(backward) == ""
        again = member.backward(ticket)
        assert "was already consumed" in member.take(again)


def test_ranks_of_one_run_share_a_pass_and_requests_of_one_member_do_not() -> None:
    server, (stranger,) = busy_server(1)
    server.holds_engine = False
    ranks = [CoreMember(server, "pair", rank=rank, world_size=2) for rank in range(2)]
    server.holds_engine = True
    stranger.forward()
    for member in ranks:
        member.forward()
        member.forward()
    finish(server)
    assert shared_by(server) == 2
    finish(server)
    assert shared_by(server) == 2


def test_large_batches_and_other_layers_are_left_alone() -> None:
    server, (one, large, other) = busy_server(3)
    one.forward()
    one.forward()
    large.forward(SHARED_TOKENS_EACH // TOKENS * TOKENS + TOKENS)
    other.forward(layer=1)
    finish(server)
    for _ in range(3):
        assert shared_by(server) == 1
        finish(server)


def test_no_more_tokens_than_gain_by_it() -> None:
    size = SHARED_TOKENS_EACH // TOKENS * TOKENS
    server, (first, *others) = busy_server(SHARED_TOKENS // size + 3)
    first.forward()
    for member in others:
        member.forward(size)
    finish(server)
    assert shared_by(server) == SHARED_TOKENS // size


def test_one_ones_bad_ids_are_its_own() -> None:
    server, (first, good, bad) = busy_server(3)
    first.forward()
    right, wrong = good.forward(), bad.forward(expert_ids=7)
    finish(server)
    assert shared_by(server) == 2
    finish(server)
    assert good.take(right) == ""
    assert "expert id 7" in bad.take(wrong)


def test_one_that_is_cancelled_before_it_begins_takes_no_other_with_it() -> None:
    server, (first, kept, cancelled) = busy_server(3)
    first.forward()
    right, gone = kept.forward(), cancelled.forward()
    finish(server)
    assert shared_by(server) == 2
    cancelled.cancel(gone)
    finish(server)
    assert kept.take(right) == ""
    assert "cancelled" in cancelled.take(gone)


def test_a_fault_in_the_shared_pass_is_told_and_each_is_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    server, (first, *others) = busy_server(3)
    first.forward()
    asked = [member.forward() for member in others]
    finish(server)

    def broken(self: SharedPass, pieces: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(SharedPass, "_compute", broken)
    finish(server)
    for member, request_id in zip(others, asked, strict=True):
        assert member.take(request_id) == ""
    assert any("planted" in text for text in server.notes)


class Turns:
    """Two members that train in turns, each some moments after its last outcome."""

    def __init__(self) -> None:
        self.server, (self.first, self.second, self.third) = busy_server(3)
        self.asked = {self.first: self.first.forward(), self.second: self.second.forward()}

    def take_turns(self, after_s: float = TURN_S) -> None:
        """Until it is known what the first one asks for after a pass, and how soon. Both have their answers then."""
        finish(self.server)
        self.ask(self.first, after_s)
        for member in (self.second, self.first):
            finish(self.server)
            assert member.has_outcome(self.asked[member])

    def ask(self, member: CoreMember, after_s: float = TURN_S) -> None:
        assert member.take(self.asked[member]) == ""
        self.server.now += after_s
        self.asked[member] = member.forward()


def test_a_pass_waits_for_a_member_that_comes_back_at_once() -> None:
    turns = Turns()
    turns.take_turns()
    turns.ask(turns.second)
    assert not turns.server.works, "the second one's pass has not waited for the first one's"
    turns.ask(turns.first, after_s=0.0)
    assert shared_by(turns.server) == 2


def test_and_not_longer_than_it_took_the_last_time() -> None:
    turns = Turns()
    turns.take_turns()
    turns.ask(turns.second)
    deadline = turns.server.core.next_deadline()
    assert deadline is not None
    assert deadline - turns.server.now <= 2 * TURN_S
    turns.server.tick(deadline)
    assert shared_by(turns.server) == 1


def test_nor_at_all_for_one_that_takes_its_time() -> None:
    turns = Turns()
    turns.take_turns(after_s=PASS_S)
    turns.ask(turns.second)
    assert shared_by(turns.server) == 1


def test_other_work_does_not_wait_with_it() -> None:
    turns = Turns()
    turns.take_turns()
    turns.ask(turns.second)
    assert not turns.server.works
    turns.third.forward(layer=1)
    assert shared_by(turns.server) == 1
    finish(turns.server)
    assert turns.third.frames[-1][0].op is Op.FORWARD
    assert np.isfinite(np.frombuffer(turns.third.frames[-1][1], np.float32)).all()


def test_nor_does_a_later_one_of_the_same_member_overtake_it() -> None:
    turns = Turns()
    turns.take_turns()
    turns.ask(turns.second)
    turns.second.forward(layer=1)
    assert not turns.server.works
    turns.ask(turns.first, after_s=0.0)
    assert shared_by(turns.server) == 2


def test_a_batch_too_large_to_share_waits_for_nobody() -> None:
    turns = Turns()
    turns.take_turns()
    turns.server.now += TURN_S
    turns.second.forward(SHARED_TOKENS_EACH // TOKENS * TOKENS + TOKENS)
    assert shared_by(turns.server) == 1
