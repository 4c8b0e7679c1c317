"""What happens between two events of the server's core: each case was a fault once."""

from __future__ import annotations

import pytest
from kt_expert_proto.header import FrameType, Header, Op
from kt_expert_proto.v1 import session_pb2 as spb
from kt_expert_server.engine.budget import Reservation
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import NotFound, NotPermitted, ServerUnavailable
from kt_expert_server.members.limits import Limits
from support.core import CoreMember, CoreServer

OTHER = "b" * 32


def pair(server: CoreServer) -> tuple[CoreMember, CoreMember]:
    return CoreMember(server, world_size=2), CoreMember(server, world_size=2, rank=1, instance=OTHER)


def save(name: str) -> dict[str, spb.CheckpointName]:
    return {"save_checkpoint": spb.CheckpointName(name=name)}


def leave_free(server: CoreServer, size_bytes: int) -> Reservation:
    """Takes all memory but so much."""
    return server.budget.reserve(Kind.SCRATCH, server.budget.limit_bytes - server.budget.total - size_bytes, "hog", "all")


def test_a_step_count_is_not_set_while_a_rank_waits_for_its_step() -> None:
    server = CoreServer()
    first, second = pair(server)
    waiting = first.ask_step(1)
    assert "ranks [0] wait for step 1 of run 'run'" in second.call(Op.SET_STEP, set_step=spb.SetStep(step=7))
    assert not first.has_outcome(waiting)
    assert second.take(second.ask_step(1)) == ""
    assert first.take(waiting) == ""


def test_work_that_cannot_be_prepared_is_that_requests_error_and_others_go_on() -> None:
    server = CoreServer()
    member, other = CoreMember(server), CoreMember(server, "other", instance=OTHER)
    hog = leave_free(server, 300_000)
    assert "are free; send fewer tokens" in member.train(tokens=900)
    assert member.train() == ""
    assert other.train() == ""
    hog.release()
    assert member.train(tokens=900) == ""


def test_memory_of_a_trainer_that_is_gone_serves_work_that_needs_it() -> None:
    server = CoreServer(Limits(lease_s=30.0))
    gone, member = CoreMember(server), CoreMember(server, "other", instance=OTHER)
    ticket = gone.forward(tokens=9_000)
    assert gone.take(ticket) == ""
    leave_free(server, 300_000)
    gone.close()
    assert "has no connection, and its memory is free in 30 s" in member.train(tokens=600)
    assert server.core.runs.by_name["run"].members
    server.now = 30.0  # its lease is over; nobody has looked yet
    assert member.train(tokens=600) == ""
    assert not server.core.runs.by_name["run"].members


def retry_delay(member: CoreMember, request_id: int) -> int:
    content = next(content for header, content in member.frames if header.request_id == request_id)
    return int(spb.ErrorDetail.FromString(content).retry_delay_ms)


def test_a_lack_of_memory_names_a_time_where_others_tickets_would_do() -> None:
    server = CoreServer()
    other, member = CoreMember(server), CoreMember(server, "other", instance=OTHER)
    held = other.forward(tokens=3000)
    assert other.take(held) == ""
    leave_free(server, 300_000)
    refused = member.forward(tokens=300)
    assert "other trainers' tickets take as much" in spb.ErrorDetail.FromString(member.frames[-1][1]).message
    assert retry_delay(member, refused) == 1000
    refused = other.forward(tokens=600)  # its own tickets are its own to give back
    assert retry_delay(other, refused) == 0


@pytest.mark.parametrize(("what", "size_bytes"), [("tickets", 100_000), ("queue", 30_000), ("adapters", 1000)])
def test_a_quota_bounds_all_runs_of_an_identity_and_nobody_else(what: str, size_bytes: int) -> None:
    server = CoreServer(Limits(quotas={what: size_bytes}))
    if what == "adapters":
        assert f"of {what} and has 0" in str(CoreMember(server, "first", identity="alice").ended)
        return
    first, second = CoreMember(server, "first", identity="alice"), CoreMember(server, "second", identity="alice")
    stranger = CoreMember(server, "third", identity="bob")
    server.holds_engine = what == "queue"  # what has been received stays
    assert not first.has_error(first.forward(tokens=120))
    refused = second.forward(tokens=120)
    assert "identity 'alice' may have" in second.take(refused)
    assert f"of {what}" in spb.ErrorDetail.FromString(second.frames[-1][1]).message
    assert not stranger.has_error(stranger.forward(tokens=120))


def test_a_quota_of_checkpoints_bounds_the_disk() -> None:
    server = CoreServer(Limits(quotas={"checkpoints": 20_000}))
    member = CoreMember(server, identity="alice")
    saved = [member.call(Op.SAVE_CHECKPOINT, **save(f"mine-{index}")) for index in range(10)]
    assert saved[0] == ""
    assert "of checkpoints and has" in saved[-1]
    assert len(server.store.names()) == saved.count("")
    other = CoreMember(server, "other", identity="bob")
    assert other.call(Op.SAVE_CHECKPOINT, **save("theirs")) == ""


def test_members_that_are_gone_make_room_for_those_who_come() -> None:
    server = CoreServer(Limits(max_members=2, lease_s=30.0))
    gone, _ = CoreMember(server), CoreMember(server, "other", instance=OTHER)
    assert "2 members are joined" in str(CoreMember(server, "third").ended)
    gone.close()
    early = CoreMember(server, "third").ended
    assert early is not None
    assert early.retry_delay_s == 30.0
    server.now = 30.0
    assert CoreMember(server, "third").ended is None


def test_two_checkpoints_of_one_name_at_once() -> None:
    server = CoreServer()
    member, other = CoreMember(server), CoreMember(server, "other", instance=OTHER)
    server.holds_disk = True
    first = member.ask(Op.SAVE_CHECKPOINT, **save("mine"))
    server.carry_out()
    assert "is being written" in other.call(Op.SAVE_CHECKPOINT, **save("mine"))
    server.holds_disk = False
    server.carry_out()
    assert member.take(first) == ""
    assert server.store.manifest("mine").run == "run"


def test_one_rank_loads_while_another_saves() -> None:
    """A load took all other requests that ran for part of what it had replaced, and the checkpoint waited for their end."""
    server = CoreServer()
    first, second = pair(server)
    assert first.call(Op.SAVE_CHECKPOINT, **save("start")) == ""
    server.holds_engine = True
    loading = second.ask(Op.LOAD_CHECKPOINT, load_checkpoint=spb.CheckpointName(name="start"))
    server.carry_out()
    saving = first.ask(Op.SAVE_CHECKPOINT, **save("mine"))
    server.carry_out()
    server.holds_engine = False
    server.carry_out()
    assert second.take(loading) == ""
    assert first.take(saving) == ""


def test_a_run_is_not_closed_before_its_last_state_is_on_disk() -> None:
    server = CoreServer(Limits(run_ttl_s=100.0, retention_s=0.0, lease_s=1.0))
    member = CoreMember(server)
    assert member.train() == ""
    assert member.take(member.ask_step(1)) == ""
    assert member.call(Op.LEAVE, leave=spb.Leave()) == ""
    server.disk.is_full = True
    server.tick(101.0)
    assert "run" in server.core.runs.by_name  # its checkpoint failed
    server.disk.is_full = False
    server.tick(130.0)
    assert "run" in server.core.runs.by_name  # not tried without end
    server.tick(162.0)
    assert "run" not in server.core.runs.by_name
    again = CoreMember(server, instance=OTHER)
    assert again.joined.step == 1


def test_a_run_that_is_opened_while_its_last_state_is_being_written() -> None:
    server = CoreServer()
    member = CoreMember(server)
    for step in (1, 2):
        assert member.train() == ""
        assert member.take(member.ask_step(step)) == ""
        server.holds_disk = step == 2
        server.core.checkpoint_all()
        server.carry_out()
    server.core.close_run("run", "", server.now)
    server.carry_out()
    again = CoreMember(server, instance=OTHER)
    server.holds_disk = False
    server.carry_out()
    assert again.joined.step == 2


def test_another_identity_learns_nothing_of_a_run_it_only_wants_to_leave() -> None:
    server = CoreServer()
    member = CoreMember(server, identity="alice")
    thief = CoreMember(server, identity="mallory", resume_only=True, epoch=2)
    assert isinstance(thief.ended, NotFound)
    assert member.call(Op.ZERO_GRAD, zero_grad=spb.ZeroGrad()) == ""
    assert isinstance(CoreMember(server, identity="mallory", epoch=2).ended, NotPermitted)


@pytest.mark.parametrize("manifest", [b"", b"{}", b"\xff"])
def test_a_damaged_checkpoint_of_another_run_is_in_nobodys_way(manifest: bytes) -> None:
    server = CoreServer()
    member = CoreMember(server)
    assert member.call(Op.SAVE_CHECKPOINT, **save("broken")) == ""
    server.disk._file(("checkpoints", "broken", "manifest.json")).content = manifest
    other = CoreMember(server, "other", instance=OTHER)
    assert other.ended is None
    assert "there are: none" in other.call(Op.LOAD_CHECKPOINT, load_checkpoint=spb.CheckpointName(name="nothing"))


def test_a_server_that_stops_does_not_wait_for_ranks_at_a_barrier() -> None:
    server = CoreServer()
    first, _ = pair(server)
    waiting = first.ask(Op.GRAD_NORM, grad_norm=spb.GradNorm())
    server.carry_out()
    assert not server.core.is_idle
    server.core.stop(server.now, 60.0)
    server.carry_out()
    assert server.core.has_stopped
    assert not first.has_outcome(waiting)  # it is asked for again, of the next server
    assert "is stopping" in str(first.ended)


def test_a_server_that_stops_finishes_and_saves_and_leaves_the_rest_to_the_next() -> None:
    server = CoreServer()
    member = CoreMember(server)
    assert member.train() == ""
    server.holds_engine = True
    step = member.ask_step(1)
    server.core.stop(server.now, 60.0)
    server.carry_out()
    late = member.forward()
    server.holds_engine, server.holds_disk = False, True
    server.carry_out()
    assert member.has_outcome(step)
    assert not server.core.has_stopped  # its checkpoint is being written
    server.holds_disk = False
    server.carry_out()
    assert not server.core.has_stopped  # the outcome is not acknowledged
    assert member.take(step) == ""
    assert server.core.has_stopped
    assert not member.has_outcome(late)
    assert isinstance(member.ended, ServerUnavailable)
    following = CoreServer(disk=server.disk)
    again = CoreMember(following, epoch=2, born=1)
    assert (again.joined.step, again.joined.received, again.joined.included) == (1, 0, step)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_last_state_that_is_no_restart_point_does_not_push_one_out(keep: int) -> None:
    server = CoreServer(Limits(checkpoint_every_steps=1, keep_checkpoints=keep))
    member = CoreMember(server)
    for number in range(1, 4):
        assert member.train() == ""
        step = member.ask_step(number)
        assert member.take(step) == ""
    assert member.call(Op.SET_STEP, set_step=spb.SetStep(step=3)) == ""
    assert member.take(member.forward()) == ""  # its ticket is of what was set: no trainer could go on from here
    server.core.stop(server.now, 60.0)
    server.carry_out()
    assert server.core.has_stopped
    assert [manifest.restart_point for _, manifest in server.store.of_run("run")] == [True] * keep + [False]
    again = CoreMember(CoreServer(disk=server.disk), epoch=2, born=1)
    assert (again.joined.step, again.joined.included) == (3, step)


def test_an_acknowledgement_that_comes_again_is_answered() -> None:
    server = CoreServer()
    member = CoreMember(server)
    member.call(Op.ZERO_GRAD, zero_grad=spb.ZeroGrad())
    before = len(member.frames)
    for _ in range(2):
        member._receive(Header(FrameType.ACK, 1, epoch=member.epoch), b"")
        server.carry_out()
    assert [header.type for header, _ in member.frames[before:]] == [FrameType.ACK, FrameType.ACK]


def test_the_first_request_after_a_restart_may_be_a_checkpoint() -> None:
    server = CoreServer(Limits(checkpoint_every_steps=1))
    member = CoreMember(server)
    assert member.train() == ""
    step = member.ask_step(1)
    assert member.take(step) == ""
    following = CoreServer(disk=server.disk)
    again = CoreMember(following, epoch=2, born=1)
    again.next_id = step + 1
    assert again.call(Op.SAVE_CHECKPOINT, **save("kept")) == ""


def test_a_checkpoint_that_another_rank_loads_does_not_undo_what_a_rank_is_known_to_have_done() -> None:
    server = CoreServer(Limits(checkpoint_every_steps=1))
    first, second = pair(server)
    steps = [first.ask_step(1), second.ask_step(1)]
    assert [first.take(steps[0]), second.take(steps[1])] == ["", ""]
    assert first.call(Op.SAVE_CHECKPOINT, **save("kept")) == ""
    for epoch in (2, 3):  # killed twice
        server = CoreServer(Limits(checkpoint_every_steps=1), disk=server.disk)
        again = CoreMember(server, world_size=2, epoch=epoch, born=epoch - 1)
        other = CoreMember(server, world_size=2, rank=1, instance=OTHER, epoch=epoch, born=epoch - 1)
        assert other.joined.included == steps[1]
        if epoch == 2:
            again.next_id = steps[0] + 2
            assert again.call(Op.LOAD_CHECKPOINT, load_checkpoint=spb.CheckpointName(name="kept")) == ""
            server.core.stop(server.now, 60.0)
            server.carry_out()


@pytest.mark.parametrize("held", ["engine", "disk", "acknowledgement"])
def test_a_server_that_stops_ends_in_time_whatever_holds_it_up(held: str) -> None:
    server = CoreServer()
    member = CoreMember(server)
    assert member.train() == ""
    server.holds_engine, server.holds_disk = held == "engine", held == "disk"
    member.ask_step(1)
    server.core.stop(server.now, 60.0)
    server.carry_out()
    assert not server.core.has_stopped
    for _ in range(3):
        deadline = server.core.next_deadline()
        if deadline is None or server.core.has_stopped:
            break
        assert deadline <= 60.0 + 30.0
        server.tick(deadline)
    assert server.core.has_stopped
