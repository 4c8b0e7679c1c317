"""Which forwards a connection may ask for past the core, and until when."""

from __future__ import annotations

from typing import Any

import kt_expert_native as native
import numpy as np
import pytest
from kt_expert_proto.fast_path import MOST_BYTES, MOST_TOKENS
from kt_expert_proto.header import FrameType, Op
from kt_expert_proto.lora import DEFAULT_ADAPTER
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from kt_expert_server.engine.fast_path import NOT_GRANTED, FastForward
from kt_expert_server.observe.observer import Observer
from simulation.model import EXPERTS, HIDDEN
from support.adapters import adamw
from support.core import CREATED, LORA, CoreMember, CoreServer

OTHER = "b" * 32


class Granted:
    """Implements FastForwards: knows what is granted, and counts."""

    def __init__(self) -> None:
        self.granted: dict[int, FastForward] = {}
        self.revoked = 0
        self._next = 100

    def grant(self, wanted: FastForward, owner: str) -> int:
        assert owner == "run"
        self._next += 1
        self.granted[self._next] = wanted
        return self._next

    def revoke(self) -> None:
        self.revoked += bool(self.granted)
        self.granted.clear()

    def report(self, observer: Observer) -> None:
        raise AssertionError(observer)


def member_with(server: CoreServer, **options: Any) -> tuple[CoreMember, Granted]:
    fast = Granted()
    return CoreMember(server, fast=fast, **options), fast


def entry_of(member: CoreMember, request_id: int) -> int:
    head = next(content for header, content in member.frames if header.request_id == request_id)
    assert member.take(request_id) == ""
    return spb.ResultHead.FromString(head).fast_entry


def test_both_ends_have_the_same_bounds() -> None:
    assert (native.FAST_TOKENS, native.FAST_PAYLOAD_BYTES) == (MOST_TOKENS, MOST_BYTES)


def test_a_small_forward_that_keeps_nothing_is_granted() -> None:
    member, fast = member_with(CoreServer())
    entry = entry_of(member, member.forward(save=False))
    wanted = fast.granted[entry]
    assert wanted.parameters is not None
    assert (wanted.dtype, wanted.top_k) == ("fp32", 2)
    assert wanted.scratch_bytes > 0


def test_others_are_not() -> None:
    member, fast = member_with(CoreServer())
    assert entry_of(member, member.forward()) == NOT_GRANTED
    assert entry_of(member, member.forward(tokens=66, save=False)) == NOT_GRANTED
    assert not fast.granted


def test_a_connection_without_it_is_told_nothing() -> None:
    member = CoreMember(CoreServer())
    assert entry_of(member, member.forward(save=False)) == NOT_GRANTED


def _write(member: CoreMember) -> int:
    return member.write("b_down", np.zeros((EXPERTS * HIDDEN, LORA[0].rank_down), np.float32))


def _edit(member: CoreMember) -> int:
    edits = [spb.GradientEdit(sets=[pb.TensorSet(adapter=DEFAULT_ADAPTER)], scale=2.0)]
    return member.ask(Op.EDIT_GRADIENTS, edit_gradients=spb.EditGradients(edits=edits))


CHANGES = {
    "step": lambda member, _: member.ask(Op.STEP, step=spb.Step(step=1, groups=[adamw(0.01)])),
    "write": lambda member, _: _write(member),
    "backward": lambda member, ticket: member.backward(ticket),
    "create": lambda member, _: member.ask(
        Op.CREATE_ADAPTER, create_adapter=spb.CreateAdapter(adapter="other", copy_of=DEFAULT_ADAPTER)
    ),
    "delete": lambda member, _: member.ask(Op.DELETE_ADAPTER, delete_adapter=spb.AdapterName(adapter=DEFAULT_ADAPTER)),
    "edit": lambda member, _: _edit(member),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_changes_a_run_revokes_first(change: Any) -> None:
    """Before the engine has it, and for every member."""
    server = CoreServer()
    member, fast = member_with(server)
    ticket = member.forward()
    assert member.take(ticket) == ""
    member.forward(save=False)
    assert fast.granted
    server.holds_engine = True
    change(member, ticket)
    server.carry_out()
    assert server.works, "the engine was given nothing"
    assert not fast.granted
    assert fast.revoked == 1


def test_another_runs_changes_revoke_nothing() -> None:
    server = CoreServer()
    member, fast = member_with(server)
    other = CoreMember(server, "another", instance=OTHER)
    member.forward(save=False)
    assert other.train() == ""
    assert other.take(other.ask_step(1)) == ""
    assert fast.granted


def test_one_ranks_change_revokes_what_the_others_have() -> None:
    server = CoreServer()
    first, fast = member_with(server, world_size=2)
    second = CoreMember(server, world_size=2, rank=1, instance=OTHER)
    first.forward(save=False)
    assert fast.granted
    _write(second)
    server.carry_out()
    assert not fast.granted


@pytest.mark.parametrize("how", ["closed", "replaced", "taken over", "run closed"])
def test_with_its_stream_it_ends(how: str) -> None:
    server = CoreServer()
    member, fast = member_with(server)
    member.forward(save=False)
    if how == "closed":
        member.close()
    elif how == "replaced":
        CoreMember(server, epoch=2, born=member.joined.born)
    elif how == "taken over":
        CoreMember(server, instance=OTHER, takeover=True)
    else:
        server.core.close_run("run", "", server.now)
        server.carry_out()
    assert not fast.granted
    assert fast.revoked == 1


def test_the_next_stream_has_its_own() -> None:
    server = CoreServer()
    member, first = member_with(server)
    member.forward(save=False)
    again, second = member_with(server, epoch=2, born=member.joined.born)
    again.next_id = member.next_id
    assert not first.granted
    assert entry_of(again, again.forward(save=False)) in second.granted


def test_an_entry_is_told_by_results_alone() -> None:
    member, _ = member_with(CoreServer())
    member.forward(save=False)
    kinds = {header.type for header, _ in member.frames}
    assert kinds == {FrameType.JOINED, FrameType.RESULT, FrameType.TENSOR}
    assert CREATED != OTHER
