"""The parts a member is made of: lease, credits, replay log, tickets, and the barrier and scheduler they meet at."""

from __future__ import annotations

import pytest
from kt_expert_proto.header import FrameError, FrameType, Header, Op
from kt_expert_proto.v1.session_pb2 import RequestOpen, ResultHead
from kt_expert_server.adapters.window import GradientWindow
from kt_expert_server.engine.work import Outcome, Work
from kt_expert_server.errors import OutOfCapacity
from kt_expert_server.members.barrier import Arrival, Barrier
from kt_expert_server.members.credits import Credits
from kt_expert_server.members.lease import Lease
from kt_expert_server.members.replay_log import Entry, Phase, ReplayLog
from kt_expert_server.members.scheduler import Job, Scheduler


def entry(request_id: int, deadline: float = 100.0) -> Entry:
    return Entry(request_id, Header(FrameType.REQUEST, request_id), RequestOpen(), 0.0, deadline)


def test_a_lease_runs_only_without_a_stream() -> None:
    lease = Lease(length_s=30.0, retention_s=900.0)
    assert lease.left_s(5000.0) is lease.ends is None
    assert not lease.is_over(5000.0)
    lease.detach(100.0)
    lease.detach(120.0)  # it runs already
    assert (lease.left_s(110.0), lease.ends, lease.reclaimed_at) == (20.0, 130.0, 1030.0)
    assert not lease.is_over(129.9)
    assert lease.is_over(130.0)
    assert not lease.may_be_reclaimed(1029.0)
    assert lease.may_be_reclaimed(1030.0)
    lease.attach()
    assert not lease.is_over(5000.0)


def test_credits_bound_requests_and_bytes() -> None:
    credits_ = Credits(2, 100)
    credits_.take(60)
    with pytest.raises(OutOfCapacity, match="1 requests and 60 bytes are without an acknowledged outcome and 50 more came"):
        credits_.take(50)
    credits_.take(40)
    with pytest.raises(OutOfCapacity, match="acknowledge outcomes first"):
        credits_.take(0)
    credits_.give_back(60)
    credits_.take(1)
    for size in (40, 1):
        credits_.give_back(size)
    with pytest.raises(AssertionError, match="given back twice"):
        credits_.give_back(1)


def test_the_log_settles_in_order_and_forgets_what_is_acknowledged() -> None:
    log = ReplayLog(0)
    entries = [entry(request_id) for request_id in (3, 4, 9)]
    for each in entries:
        log.add(each)
    assert (log.received, log.last_settled, log.head()) == (9, 0, entries[0])
    with pytest.raises(AssertionError, match="request 4 got its outcome out of order"):
        log.settle(entries[1], Outcome(ResultHead()))
    log.settle(entries[0], Outcome(ResultHead()))
    log.settle(entries[1], Outcome(ResultHead()))
    assert (log.last_settled, log.head()) == (4, entries[2])
    with pytest.raises(FrameError, match="outcomes up to 9 were acknowledged, the last one sent is that of 4"):
        log.acknowledge(9)
    assert log.acknowledge(3) == [entries[0]]
    assert log.acknowledge(3) == []
    assert log.acknowledge(4) == [entries[1]]
    assert (list(log), log.acknowledged) == ([entries[2]], 4)
    with pytest.raises(AssertionError):
        log.add(entry(9))


def arrival(request_id: int, op: Op = Op.STEP, deadline: float = 100.0, *, patient: bool = False) -> Arrival:
    return Arrival(entry(request_id, deadline), op, "step 1" if op is Op.STEP else "grad_norm", None, patient)


def test_a_barrier_is_complete_when_all_have_come() -> None:
    barrier = Barrier(3)
    for rank in (2, 0):
        barrier.arrive(rank, arrival(rank + 1))
        assert barrier.complete() is None
    barrier.arrive(1, arrival(2))
    complete = barrier.complete()
    assert complete is not None
    assert list(complete) == [0, 1, 2]
    assert not barrier.waiting


def test_the_norm_is_told_while_others_wait_for_the_step() -> None:
    barrier = Barrier(2)
    barrier.arrive(0, arrival(1, Op.STEP))
    barrier.arrive(1, arrival(1, Op.GRAD_NORM))
    complete = barrier.complete()
    assert complete is not None
    assert list(complete) == [1]
    assert list(barrier.waiting) == [0]
    barrier.arrive(1, arrival(2, Op.STEP))
    assert list(barrier.complete() or ()) == [0, 1]


def test_a_barrier_names_who_is_missing_when_a_deadline_passes() -> None:
    barrier = Barrier(4)
    barrier.arrive(1, arrival(1, deadline=5.0))
    barrier.arrive(3, arrival(1, deadline=9.0, patient=True))
    assert barrier.next_deadline() == 5.0
    assert barrier.impatient() == [1]
    assert not barrier.late(4.9)
    late = barrier.late(5.0)
    assert list(late) == [1]
    assert "step 1 waited 5 s for ranks [0, 2] of 4; nothing was applied" in str(late[1])
    assert barrier.withdraw(1) is not None
    assert barrier.withdraw(1) is None
    assert list(barrier.waiting) == [3]


class Costly(Work):
    def __init__(self, cost: float, parts: int = 1, kind: str = "other") -> None:
        super().__init__()
        self.cost, self.parts, self.kind = cost, parts, kind

    def run_part(self, part: int) -> None: ...

    def commit(self) -> Outcome:
        return Outcome()


def job(run: str, rank: int = 0, cost: float = 1.0, *, urgent: bool = False) -> Job:
    return Job(Costly(cost), run, rank, lambda _: None, is_urgent=urgent)


def test_the_run_that_had_least_comes_first_and_idleness_is_not_saved_up() -> None:
    scheduler = Scheduler()
    for _ in range(4):
        scheduler.add(job("heavy", cost=10.0))
    assert [scheduler.take().run for _ in range(2)] == ["heavy", "heavy"]  # type: ignore[union-attr]
    for _ in range(3):
        scheduler.add(job("light", cost=4.0))
    order = [scheduler.take().run for _ in range(5)]  # type: ignore[union-attr]
    assert order == ["light", "heavy", "light", "light", "heavy"]
    assert scheduler.take() is None


def _order(scheduler: Scheduler) -> list[str]:
    """Runs in the order in which their parts are done."""
    order = []
    while (taken := scheduler.take()) is not None:
        order.append(f"{taken.run}{taken.part}")
        if taken.part + 1 < taken.work.parts:
            taken.part += 1
            scheduler.add(taken)
    return order


def _long(run: str, parts: int, rank: int = 0, kind: str = "other") -> Job:
    return Job(Costly(10.0, parts, kind), run, rank, lambda _: None)


def test_a_small_piece_waits_for_one_part_of_a_long_one() -> None:
    scheduler = Scheduler()
    scheduler.add(_long("long", 4))
    first = scheduler.take()
    assert first is not None
    scheduler.add(job("small"))
    first.part = 1
    scheduler.add(first)
    assert _order(scheduler) == ["small0", "long1", "long2", "long3"]


def test_long_pieces_of_two_runs_take_turns_and_those_of_one_do_not() -> None:
    scheduler = Scheduler()
    for each in (_long("a", 2), _long("a", 2, rank=1), _long("b", 3)):
        scheduler.add(each)
    assert _order(scheduler) == ["a0", "b0", "a1", "b1", "a0", "b2", "a1"]


def test_what_is_urgent_waits_for_the_end_of_what_its_run_has_begun() -> None:
    scheduler = Scheduler()
    scheduler.add(_long("run", 2))
    begun = scheduler.take()
    assert begun is not None
    begun.part = 1
    scheduler.add(begun)
    scheduler.add(job("run", urgent=True))
    scheduler.add(job("other", cost=100.0))
    assert scheduler.is_begun("run", 0)
    assert not scheduler.remove(begun)
    assert _order(scheduler) == ["other0", "run1", "run0"]


def test_backwards_come_first_within_a_run() -> None:
    scheduler = Scheduler()
    for kind in ("forward", "backward"):
        scheduler.add(Job(Costly(1.0, kind=kind), "run", int(kind == "forward"), lambda _: None))
    taken = scheduler.take()
    assert taken is not None
    assert taken.work.kind == "backward"


def test_members_of_a_run_take_turns_and_what_is_urgent_comes_first() -> None:
    scheduler = Scheduler()
    for rank in (0, 0, 0, 1):
        scheduler.add(job("run", rank))
    copy = job("run", urgent=True)
    withdrawn = job("run", 1)
    scheduler.add(withdrawn)
    scheduler.add(copy)
    assert scheduler.remove(withdrawn)
    assert not scheduler.remove(withdrawn)
    assert scheduler.take() is copy
    assert [scheduler.take().rank for _ in range(4)] == [1, 0, 0, 0]  # type: ignore[union-attr]
    scheduler.forget("run")
    assert len(scheduler) == 0


def test_a_window_counts_what_was_added_since_it_opened() -> None:
    window = GradientWindow()
    assert window.is_empty
    window.add(3, 0b101)
    window.add(3, 0b110)
    assert (window.open(3), window.open(4), window.is_empty) == (0b111, 0, False)
    window.end({3: 0b100})
    assert (window.open(3), window.there(3), window.is_empty) == (0b100, 0b111, False)
    window.end({})
    assert (window.open(3), window.there(3), window.is_empty) == (0, 0b111, True)
    window.close()
    assert window.there(3) == 0
    assert Phase.QUEUED is not Phase.DONE
