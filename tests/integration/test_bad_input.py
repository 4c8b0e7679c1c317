"""Bad input is a clear error with the right code; the server goes on serving and nothing that was accepted is lost."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from kt_expert_proto.frame import MAX_MESSAGE_BYTES, Dtype, FrameType, Op, Tensor, encode
from kt_expert_proto.v1 import service_pb2 as pb
from support.raw import EXPERTS, HIDDEN, TIMEOUT_S, TOP_K, RawMember
from support.server import ServerProcess

INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PHASE, DEADLINE = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED
EXHAUSTED, OK = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK


@pytest.fixture
def member(server: ServerProcess) -> Iterator[RawMember]:
    with RawMember(server.address, f"raw-{uuid.uuid4().hex}") as raw:
        yield raw
        raw.stub.LeaveRun(pb.MemberRequest(member=raw.joined.member), timeout=TIMEOUT_S)


BAD_REQUESTS = {
    "hidden size": ({"hidden": HIDDEN + 1}, INVALID, f"takes hidden size {HIDDEN}, the request has {HIDDEN + 1}"),
    "top k": ({"top_k": 3}, INVALID, f"routes each token to {TOP_K} experts, the request has 3"),
    "dtype": ({"dtype": Dtype.BF16}, INVALID, "travel as FP32, the request has BF16"),
    "layer": ({"layer": 77}, MISSING, "layer 77 has no experts; layers with experts: 0 to 2"),
    "op": ({"op": Op.NONE}, INVALID, "expected FORWARD or BACKWARD"),
    "too many tokens": ({"tokens": 1 << 20}, INVALID, "at most 65536 are taken"),
    "id too large": ({"ids": np.full((3, TOP_K), EXPERTS + 1, np.int32)}, INVALID, r"expert id 9 at token 0, slot 0"),
    "id negative": ({"ids": np.full((3, TOP_K), -5, np.int32)}, INVALID, "expert id -5"),
    "NaN weight": ({"weights": np.full((3, TOP_K), np.nan, np.float32)}, INVALID, "expected a finite number"),
}


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_bad_forward_is_refused_and_the_stream_goes_on(member: RawMember, what: str) -> None:
    fields, code, text = BAD_REQUESTS[what]
    assert member.ask(member.forward_frames(member.take_id()))[0] is OK
    got, message = member.ask(member.forward_frames(member.take_id(), **fields))
    assert got is code
    assert text in message
    assert member.ask(member.forward_frames(member.take_id()))[0] is OK


def test_a_ticket_serves_exactly_one_backward(member: RawMember) -> None:
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    assert member.ask(member.backward_frames(member.take_id(), 4711)) == (
        MISSING,
        "ticket 4711 does not exist; run the forward with save_for_backward and name its request id",
    )
    code, message = member.ask(member.backward_frames(member.take_id(), ticket, layer=1))
    assert (code, "belongs to layer 0, not to layer 1" in message) == (INVALID, True)
    code, message = member.ask(member.backward_frames(member.take_id(), ticket, tokens=2))
    assert (code, "dy has shape (2, 32), expected (3, 32)" in message) == (INVALID, True)
    first = member.take_id()
    assert member.ask(member.backward_frames(first, ticket))[0] is OK
    code, message = member.ask(member.backward_frames(member.take_id(), ticket))
    assert (code, message) == (
        PHASE,
        f"ticket {ticket} was already consumed by backward request {first}; a ticket serves exactly one backward",
    )


def test_credits_are_enforced(member: RawMember) -> None:
    def opening(request_id: int) -> bytes:
        return member.forward_frames(request_id)[0]

    for _ in range(member.joined.credit_requests):
        member.send(opening(member.take_id()))
    code, message = member.ask([opening(member.take_id())])
    assert code is EXHAUSTED
    assert "acknowledge outcomes first" in message


def test_a_request_in_flight_passes_its_deadline(member: RawMember) -> None:
    frames = member.forward_frames(member.take_id(), deadline_ms=1)
    code, message = member.ask(frames[:1])  # and then silence
    assert code is DEADLINE
    assert "deadline passed before all of its frames came" in message
    for frame in frames[1:]:
        member.send(frame)  # late frames of a request that has ended are ignored
    assert member.ask(member.forward_frames(member.take_id()))[0] is OK


BAD_MESSAGES = {
    "truncated frame": lambda m: m.forward_frames(1)[0][:-3],
    "truncated header": lambda m: m.forward_frames(1)[0][:40],
    "not a frame": lambda m: b"GET / HTTP/1.1\r\n\r\n" + bytes(100),
    "above one message": lambda m: bytes(MAX_MESSAGE_BYTES + 1),
    "data without a request": lambda m: m.forward_frames(m.take_id())[1],
    "end without a request": lambda m: m.forward_frames(m.take_id())[-1],
    "stale epoch": lambda m: encode(m.header(FrameType.ACK, 1).__class__(FrameType.ACK, 1, epoch=99)),
    "server's own frame type": lambda m: encode(m.header(FrameType.RESULT, 1)),
    "acknowledging nothing": lambda m: encode(m.header(FrameType.ACK, 12345)),
    "not a RequestOpen": lambda m: encode(m.header(FrameType.OPEN, m.take_id()), b"\xff\xff\xff"),
}


@pytest.mark.parametrize("what", BAD_MESSAGES)
def test_a_malformed_message_ends_its_stream_only(server: ServerProcess, member: RawMember, what: str) -> None:
    member.send(BAD_MESSAGES[what](member))
    error = member.stream_error()
    assert error.code() is INVALID, error.details()
    assert "malformed frame" in error.details()
    # The member keeps its place: it joins again and goes on where it was.
    member.rejoin(resume=True)
    assert member.ask(member.forward_frames(member.take_id()))[0] is OK
    with RawMember(server.address, f"other-{uuid.uuid4().hex}") as other:
        assert other.ask(other.forward_frames(other.take_id()))[0] is OK


def test_a_message_above_the_transport_limit_is_resource_exhausted(member: RawMember) -> None:
    member.send(bytes(9 * MAX_MESSAGE_BYTES))
    assert member.stream_error().code() is EXHAUSTED


def test_incomplete_or_misplaced_data_ends_the_stream(member: RawMember) -> None:
    frames = member.forward_frames(member.take_id())
    for frame in (frames[0], frames[2], frames[-1]):
        member.send(frame)
    error = member.stream_error()
    assert error.code() is INVALID
    assert "ended with 0 of 24 bytes of EXPERT_IDS" in error.details()


def test_pieces_must_come_in_order(member: RawMember) -> None:
    request_id = member.take_id()
    member.send(member.forward_frames(request_id)[0])
    late = member.header(FrameType.DATA, request_id, tensor=Tensor.HIDDEN_STATES, offset=64)
    member.send(encode(late, bytes(64)))
    assert "bytes 64 to 128 came, expected to go on at 0 of 384" in member.stream_error().details()


def test_request_ids_increase(member: RawMember) -> None:
    request_id = member.take_id()
    assert member.ask(member.forward_frames(request_id))[0] is OK
    member.send(member.forward_frames(request_id)[0])
    assert f"request id {request_id} came after {request_id}" in member.stream_error().details()


def test_a_repeated_request_gets_its_stored_outcome(server: ServerProcess, member: RawMember) -> None:
    """The outcome of a request that was not acknowledged is sent again and the gradients count once."""
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    backward = member.backward_frames(member.take_id(), ticket)
    before = server.metric("kt_expert_duplicate_requests_total")
    for frame in backward:
        member.send(frame)
    first = [bytes(payload) for header, payload in _outcome(member)]
    norm = _norm(member, 1)
    for frame in backward:
        member.send(frame)
    assert [bytes(payload) for header, payload in _outcome(member)] == first
    assert _norm(member, 2) == norm > 0
    assert server.metric("kt_expert_duplicate_requests_total") == before + 1


def _outcome(member: RawMember) -> Iterator[tuple[object, memoryview]]:
    for header, payload in member._incoming:
        yield header, payload
        if header.type in (FrameType.END, FrameType.ERROR):
            return


def _norm(member: RawMember, sequence: int) -> float:
    request = pb.GradNormRequest(
        member=member.joined.member, after_request_id=member.next_id - 1, sequence=sequence, timeout_s=10
    )
    return float(member.stub.GradNorm(request, timeout=TIMEOUT_S).norm)


def _code(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    return caught.value.code(), caught.value.details()


def test_control_calls_name_what_is_wrong(member: RawMember) -> None:
    stub, timeout = member.stub, TIMEOUT_S
    config = pb.RunConfig(world_size=1, wire_dtype=pb.WIRE_DTYPE_BF16)
    twice = pb.RunConfig(world_size=1, wire_dtype=1, lora=[pb.LayerLora(layer=0, rank_up=1), pb.LayerLora(layer=0)])
    far = pb.RunConfig(world_size=1, wire_dtype=1, lora=[pb.LayerLora(layer=9, rank_up=1)])
    odd = pb.RunConfig(world_size=1, wire_dtype=1, moment_dtype=7)  # type: ignore[arg-type]  # not a value of the enum
    empty = pb.StepRequest(member=member.joined.member, step=1, timeout_s=timeout)
    partial = pb.StepRequest(
        member=member.joined.member,
        step=1,
        timeout_s=timeout,
        groups=[pb.ParamGroup(tensors=["a_up"], sgd=pb.Sgd(learning_rate=1.0))],
    )
    huge = pb.RunConfig(world_size=1, wire_dtype=1, lora=[pb.LayerLora(layer=0, rank_up=1 << 20)])
    groups = [pb.ParamGroup(adamw=pb.Adam(learning_rate=1e-3, beta1=0.9, beta2=2.0, eps=1e-8))]
    step = pb.StepRequest(member=member.joined.member, step=1, grad_scale=1, groups=groups, timeout_s=1)
    late = pb.StepRequest(
        member=member.joined.member, step=5, grad_scale=1, timeout_s=1,
        groups=[pb.ParamGroup(adamw=pb.Adam(learning_rate=1e-3, beta1=0.9, beta2=0.9, eps=1e-8))],
    )  # fmt: skip
    cases = [
        (lambda: stub.JoinRun(pb.JoinRunRequest(run="nowhere"), timeout=timeout), MISSING, "run 'nowhere' is not open"),
        (lambda: stub.CloseRun(pb.CloseRunRequest(run="nowhere"), timeout=timeout), MISSING, "nowhere"),
        (lambda: stub.LeaveRun(pb.MemberRequest(member="x"), timeout=timeout), MISSING, "join the run again"),
        (lambda: stub.OpenRun(pb.OpenRunRequest(run="../x", config=config), timeout=timeout), INVALID, "not allowed"),
        (lambda: stub.OpenRun(pb.OpenRunRequest(run="a"), timeout=timeout), INVALID, "wire_dtype is 0"),
        (lambda: stub.OpenRun(pb.OpenRunRequest(run="a", config=twice), timeout=timeout), INVALID, "two LoRA entries"),
        (lambda: stub.OpenRun(pb.OpenRunRequest(run="a", config=far), timeout=timeout), MISSING, "layer 9"),
        (lambda: stub.OpenRun(pb.OpenRunRequest(run="a", config=huge), timeout=timeout), INVALID, "at most 65536"),
        (lambda: stub.Step(step, timeout=timeout), INVALID, "beta2, expected 0 <= beta2 < 1: 2.0"),
        (lambda: stub.Step(empty, timeout=timeout), INVALID, "the step has no groups"),
        (lambda: stub.Step(partial, timeout=timeout), INVALID, "no group of the step holds a_gate"),
        (lambda: stub.OpenRun(pb.OpenRunRequest(run="a", config=odd), timeout=timeout), INVALID, "MomentDtype"),
        (lambda: stub.Step(late, timeout=timeout), PHASE, "step 5 was asked for, the next is 1"),
        (lambda: stub.Hello(pb.HelloRequest(protocol_version=99), timeout=timeout), PHASE, "speaks protocol 99"),
    ]
    for call, code, text in cases:
        got, details = _code(call)
        assert got is code, details
        assert text in details


def test_a_second_join_fences_the_first(member: RawMember) -> None:
    old = member.joined
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    again = member.stub.JoinRun(pb.JoinRunRequest(run=member.run, rank=0, resume_member=old.member), timeout=TIMEOUT_S)
    assert (again.epoch, again.last_request_id) == (old.epoch + 1, ticket)
    error = member.stream_error()
    assert error.code() is PHASE
    assert "epoch 2 replaces this one" in error.details()
    member.attach()
    assert member.stream_error().code() is MISSING
    # What the fenced process still says, even that it leaves, does not reach its successor.
    leave = pb.MemberRequest(member=old.member)
    assert _code(lambda: member.stub.LeaveRun(leave, timeout=TIMEOUT_S))[0] is MISSING
    member.joined = again
    member.attach(epoch=old.epoch)
    assert f"epoch {old.epoch} is stale" in member.stream_error().details()
    member.attach()
    assert member.ask(member.backward_frames(member.take_id(), ticket))[0] is OK


def test_a_restarted_process_starts_afresh(member: RawMember) -> None:
    """A rank that joins without naming its predecessor owes nothing: credits are full, old tickets are gone."""
    ticket = member.take_id()
    for request_id in (ticket, *(member.take_id() for _ in range(member.joined.credit_requests - 1))):
        for frame in member.forward_frames(request_id):
            member.send(frame)
    for _ in range(member.joined.credit_requests):
        list(_outcome(member))  # received and never acknowledged
    member.rejoin(resume=False)
    status = member.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert [m.tickets for run in status.runs if run.run == member.run for m in run.members] == [0]
    for _ in range(2 * member.joined.credit_requests):
        assert member.ask(member.forward_frames(member.take_id(), save=False))[0] is OK
    assert member.ask(member.backward_frames(member.take_id(), ticket))[0] is MISSING


def test_a_replayed_half_sent_request_is_taken(member: RawMember) -> None:
    frames = member.forward_frames(member.take_id())
    member.send(frames[0])
    member.send(frames[1])
    other = member.take_id()
    assert member.ask(member.forward_frames(other))[0] is OK
    member.rejoin(resume=True)
    request_id = other - 1
    assert member.ask(member.forward_frames(request_id))[0] is OK


def test_one_ticket_in_two_backwards_at_once_counts_once(member: RawMember) -> None:
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    both = [member.take_id(), member.take_id()]
    for request_id in both:
        for frame in member.backward_frames(request_id, ticket):
            member.send(frame)
    kinds = [[header.type for header, _ in _outcome(member)][-1] for _ in both]
    assert kinds == [FrameType.END, FrameType.ERROR]


def test_unacknowledged_errors_do_not_pile_up(member: RawMember) -> None:
    for _ in range(10 * member.joined.credit_requests):
        member.send(member.forward_frames(member.take_id(), layer=99)[0])
    error = member.stream_error()
    assert error.code() is INVALID
    assert "acknowledge them as they come" in error.details()


def test_a_missing_member_is_named_when_the_deadline_passes(server: ServerProcess) -> None:
    with RawMember(server.address, f"pair-{uuid.uuid4().hex}", world_size=3, rank=1) as member:
        groups = [pb.ParamGroup(adamw=pb.Adam(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8))]
        request = pb.StepRequest(member=member.joined.member, step=1, grad_scale=1.0, groups=groups, timeout_s=0.2)
        code, details = _code(lambda: member.stub.Step(request, timeout=TIMEOUT_S))
        assert code is DEADLINE
        assert "waited 0.2 s for ranks [0, 2] of 3; nothing was applied" in details
        assert member.ask(member.forward_frames(member.take_id()))[0] is OK
        member.stub.LeaveRun(pb.MemberRequest(member=member.joined.member), timeout=TIMEOUT_S)


def test_uploads_are_checked_before_they_count(member: RawMember) -> None:
    run = member.run

    def put(**fields: object) -> tuple[grpc.StatusCode, str]:
        good = {
            "run": run, "layer": 0, "tensor": "a_down", "part": pb.ADAPTER_PART_PARAMETER, "shape": [EXPERTS, 4, 24],
            "data": np.zeros(EXPERTS * 4 * 24, np.float32).tobytes(),
        }  # fmt: skip
        chunk = pb.AdapterChunk(**good | fields)
        return _code(lambda: member.stub.PutAdapter(iter([chunk]), timeout=TIMEOUT_S))

    assert put(layer=2)[0] is MISSING
    assert put(tensor="a_up")[0] is MISSING
    assert put(part=0)[0] is INVALID
    assert "has shape (8, 4, 23)" in put(shape=[EXPERTS, 4, 23])[1]
    assert "ended after 8 of" in put(data=bytes(8))[1]
    nan = np.full(EXPERTS * 4 * 24, np.nan, np.float32).tobytes()
    assert "not finite" in put(data=nan)[1]
    assert _code(lambda: member.stub.PutAdapter(iter([]), timeout=TIMEOUT_S))[0] is INVALID
