"""Bad input is a clear error with the right code; the server goes on serving and nothing that was accepted is lost."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import MAX_MESSAGE_BYTES, FrameType, Header, Op, Tensor
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import session_pb2 as spb
from support.adapters import GRADIENTS, adamw
from support.raw import EXPERTS, HIDDEN, TIMEOUT_S, TOKENS, TOP_K, RawMember
from support.server import ServerProcess

INVALID, MISSING = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PHASE, DEADLINE = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED
EXHAUSTED, OK = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK
DAMAGED, ABORTED = grpc.StatusCode.DATA_LOSS, grpc.StatusCode.ABORTED
EXISTS = grpc.StatusCode.ALREADY_EXISTS


@pytest.fixture
def member(server: ServerProcess) -> Iterator[RawMember]:
    with RawMember(server.address, f"raw-{uuid.uuid4().hex}") as raw:
        yield raw
        raw.rejoin(resume=False)  # whatever a test left unacknowledged
        raw.leave()


BAD_REQUESTS = {
    "hidden size": ({"columns": HIDDEN + 1}, INVALID, f"takes hidden size {HIDDEN}, the request has {HIDDEN + 1}"),
    "top k": ({"top_k": EXPERTS + 1}, INVALID, f"has {EXPERTS} experts, the request routes each token to {EXPERTS + 1}"),
    "no top k": ({"top_k": 0}, INVALID, "the request routes each token to 0"),
    "dtype": ({"dtype": Dtype.BF16}, INVALID, "travel as FP32, the request has BF16"),
    "layer": ({"layer": 77}, MISSING, "layer 77 has no experts; layers with experts: 0 to 2"),
    "op": ({"op": Op.NONE}, INVALID, "op NONE came with forward"),
    "other op": ({"op": Op.STEP}, INVALID, "op STEP came with forward"),
    "too many tokens": ({"rows": 1 << 20}, INVALID, "at most 65536 are taken"),
    "id too large": ({"ids": np.full((3, TOP_K), EXPERTS + 1, np.int32)}, INVALID, r"expert id 9 at token 0, slot 0"),
    "id negative": ({"ids": np.full((3, TOP_K), -5, np.int32)}, INVALID, "expert id -5"),
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
    code, message = member.ask(member.backward_frames(member.take_id(), ticket, rows=2))
    assert (code, "had 3 tokens, its backward has 2" in message) == (INVALID, True)
    first = member.take_id()
    assert member.ask(member.backward_frames(first, ticket))[0] is OK
    code, message = member.ask(member.backward_frames(member.take_id(), ticket))
    assert (code, message) == (
        PHASE,
        f"ticket {ticket} was already consumed by backward request {first}; a ticket serves exactly one backward",
    )


def test_credits_are_enforced(member: RawMember) -> None:
    for _ in range(member.joined.credit_requests):
        member.send(*member.forward_frames(member.take_id()))
    member.send(*member.forward_frames(member.take_id()))
    outcomes = [member.outcome()[0] for _ in range(member.joined.credit_requests + 1)]
    assert [header.type for header, _ in outcomes] == [FrameType.RESULT] * member.joined.credit_requests + [FrameType.ERROR]
    assert "acknowledge outcomes first" in spb.ErrorDetail.FromString(outcomes[-1][1]).message
    member.acknowledge(outcomes[-1][0].request_id)
    assert member.ask(member.forward_frames(member.take_id()))[0] is OK


def test_a_request_in_flight_passes_its_deadline(member: RawMember) -> None:
    frames = member.forward_frames(member.take_id(), deadline_ms=1)
    code, message = member.ask(frames[:1])  # and then silence
    assert code is DEADLINE
    assert "deadline passed before all of its tensors came" in message
    member.send(*frames[1:])  # late tensors of a request that has ended are passed over
    assert member.ask(member.forward_frames(member.take_id()))[0] is OK


def changed(message: bytes, at: int) -> bytes:
    return message[:at] + bytes([message[at] ^ 0x10]) + message[at + 1 :]


DAMAGED_MESSAGES = {
    "truncated frame": lambda m: m.encoded(*m.forward_frames(1)[:1])[:-3],
    "truncated header": lambda m: m.encoded(*m.forward_frames(1)[:1])[:40],
    "not a frame": lambda m: b"GET / HTTP/1.1\r\n\r\n" + bytes(100),
    "above one message": lambda m: bytes(MAX_MESSAGE_BYTES + 1),
    "a changed byte of a header": lambda m: changed(m.encoded(*m.forward_frames(1)[:1]), 34),
    "a changed byte of a payload": lambda m: changed(m.encoded(*m.forward_frames(1)[:2]), 74),
    "a message twice": lambda m: b"".join([m.encoded((m.header(FrameType.RELEASE, 1), b""))] * 2),
    "a message lost": lambda m: [m.encoded((m.header(FrameType.RELEASE, 1), b"")) for _ in range(2)][1],
}
WRONG_FRAMES = {
    "tensor without a request": lambda m: m.forward_frames(m.take_id())[1],
    "stale epoch": lambda m: (Header(FrameType.ACK, 1, epoch=99), b""),
    "server's own frame type": lambda m: (m.header(FrameType.RESULT, 1), b""),
    "acknowledging nothing": lambda m: (m.header(FrameType.ACK, 12345), b""),
    "not a RequestOpen": lambda m: (m.header(FrameType.REQUEST, m.take_id()), b"\xff\xff\xff"),
    "a second join": lambda m: (Header(FrameType.JOIN, epoch=1), b""),
}


def goes_on(server: ServerProcess, member: RawMember) -> None:
    """The member keeps its place: it joins again and goes on where it was; others never noticed."""
    member.rejoin(resume=True)
    assert member.joined.resumed
    assert member.ask(member.forward_frames(member.take_id()))[0] is OK
    with RawMember(server.address, f"other-{uuid.uuid4().hex}") as other:
        assert other.ask(other.forward_frames(other.take_id()))[0] is OK
        other.leave()


@pytest.mark.parametrize("what", DAMAGED_MESSAGES)
def test_a_damaged_message_ends_its_stream_only(server: ServerProcess, member: RawMember, what: str) -> None:
    member.send_bytes(DAMAGED_MESSAGES[what](member))
    error = member.stream_error()
    assert error.code() is DAMAGED, error.details()
    assert "malformed frame" in error.details()
    goes_on(server, member)


@pytest.mark.parametrize("what", WRONG_FRAMES)
def test_a_frame_that_may_not_come_ends_its_stream_only(server: ServerProcess, member: RawMember, what: str) -> None:
    member.send(WRONG_FRAMES[what](member))
    error = member.stream_error()
    assert error.code() is INVALID, error.details()
    assert "malformed frame" in error.details()
    goes_on(server, member)


def test_a_message_above_the_transport_limit_is_resource_exhausted(member: RawMember) -> None:
    member.send_bytes(bytes(9 * MAX_MESSAGE_BYTES))
    assert member.stream_error().code() is EXHAUSTED


def test_a_request_before_the_last_one_is_complete_ends_the_stream(member: RawMember) -> None:
    frames = member.forward_frames(member.take_id())
    member.send(frames[0], frames[2], *member.forward_frames(member.take_id()))
    error = member.stream_error()
    assert error.code() is INVALID
    assert f"had its EXPERT_IDS INT32 [{TOKENS}, {TOP_K}], HIDDEN_STATES FP32" in error.details()


def test_a_tensor_of_another_shape_ends_the_stream(member: RawMember) -> None:
    request_id = member.take_id()
    member.send(member.forward_frames(request_id)[0])
    member.send(member.tensor(request_id, Tensor.HIDDEN_STATES, Dtype.FP32, np.ones((TOKENS + 1, HIDDEN), np.float32)))
    assert f"got HIDDEN_STATES FP32 [{TOKENS + 1}, {HIDDEN}]" in member.stream_error().details()


def test_an_acknowledged_request_is_not_run_again(server: ServerProcess, member: RawMember) -> None:
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    before = server.metric('kt_expert_tokens_total{pass="forward"}')
    member.send(*member.forward_frames(ticket))
    assert member.ask(member.backward_frames(member.take_id(), ticket))[0] is OK
    assert server.metric('kt_expert_tokens_total{pass="forward"}') == before


def test_a_repeated_request_counts_once_and_has_one_outcome(server: ServerProcess, member: RawMember) -> None:
    """A stream carries an outcome once, so a repetition on it asks for nothing; on another stream it is sent again."""
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    backward = member.backward_frames(member.take_id(), ticket)
    before = server.metric("kt_expert_duplicate_requests_total")
    member.send(*backward)
    first = member.outcome()
    norm = _norm(member)
    member.send(*backward)
    member.acknowledge(first[0][0].request_id)
    assert _norm(member) == norm > 0
    assert server.metric("kt_expert_duplicate_requests_total") == before + 1


def test_outcomes_are_sent_again_to_a_member_that_lost_its_stream(member: RawMember) -> None:
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    request_id = member.take_id()
    member.send(*member.backward_frames(request_id, ticket))
    first = member.outcome()
    member.rejoin(resume=True, tickets=[])
    assert (member.joined.resumed, member.joined.received) == (True, request_id)
    again = member.outcome()
    assert [payload for _, payload in again] == [payload for _, payload in first]
    member.acknowledge(request_id)


def _norm(member: RawMember) -> float:
    member.send(*member.call_frames(Op.GRAD_NORM, spb.RequestOpen(grad_norm=spb.GradNorm(sets=GRADIENTS, order=2.0))))
    (header, payload), *_ = member.outcome()
    member.acknowledge(header.request_id) if header.request_id - 1 == member.acknowledged else None
    return float(spb.ResultHead.FromString(payload).norm)


def _code(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()  # type: ignore[operator]
    return caught.value.code(), caught.value.details()


def test_joins_name_what_is_wrong(server: ServerProcess) -> None:
    lora = [pb.LayerLora(layer=0, rank_down=4, scale_down=1.0)]
    good = {"world_size": 1, "wire_dtype": pb.WIRE_DTYPE_FP32, "lora": lora}
    taken = RawMember(server.address, "taken")
    cases = [
        ({"run": "../x"}, INVALID, "not allowed"),
        ({"config": pb.RunConfig(world_size=1)}, INVALID, "wire_dtype is 0"),
        ({"config": pb.RunConfig(**good | {"world_size": 0})}, INVALID, "world size is 0"),
        ({"config": pb.RunConfig(**good | {"lora": [*lora, pb.LayerLora(layer=0)]})}, INVALID, "two LoRA entries"),
        ({"config": pb.RunConfig(**good | {"lora": [pb.LayerLora(layer=9, rank_up=1)]})}, MISSING, "layer 9"),
        ({"config": pb.RunConfig(**good | {"lora": [pb.LayerLora(layer=0, rank_up=1 << 20)]})}, INVALID, "at most 65536"),
        ({"config": pb.RunConfig(**good | {"moment_dtype": 7})}, INVALID, "MomentDtype"),
        ({"rank": 1}, INVALID, "rank 1 is outside [0, 1)"),
        ({"instance": "short"}, INVALID, "16 to 64 letters and digits"),
        ({"run": "taken"}, EXISTS, "is held by another trainer that is connected"),
        ({"run": "taken", "config": pb.RunConfig(**good | {"seed": 5})}, EXISTS, "seed is 0, asked for 5"),
        ({"run": "nowhere", "resume_only": True}, MISSING, "not a member of run 'nowhere'"),
    ]
    for fields, code, text in cases:
        with RawMember(server.address, "wrong-join", join=False) as raw:
            with pytest.raises(grpc.RpcError) as caught:
                raw.join(**fields)
            assert caught.value.code() is code, caught.value.details()
            assert text in caught.value.details()
    with taken:
        taken.leave()


def test_frames_before_joining_end_the_stream(server: ServerProcess) -> None:
    for frame in (
        lambda m: (m.header(FrameType.ACK, 1), b""),
        lambda m: m.forward_frames(1)[1],
        lambda m: (Header(FrameType.JOIN, epoch=1), b"\xff\xff"),
    ):
        with RawMember(server.address, "silent", join=False) as raw:
            raw.send(frame(raw))
            assert raw.stream_error().code() is INVALID


def test_control_calls_name_what_is_wrong(member: RawMember) -> None:
    stub, timeout = member.stub, TIMEOUT_S
    cases = [
        (lambda: stub.CloseRun(pb.CloseRunRequest(run="nowhere"), timeout=timeout), MISSING, "nowhere"),
        (lambda: stub.Hello(pb.HelloRequest(protocol_version=99), timeout=timeout), PHASE, "speaks protocol 99"),
    ]
    for call, code, text in cases:
        got, details = _code(call)
        assert got is code, details
        assert text in details


def adam(**numbers: float) -> list[pb.ParamGroup]:
    return [adamw(1e-3, **numbers)]


def test_steps_name_what_is_wrong(member: RawMember) -> None:
    nowhere = pb.ParamGroup(sets=[pb.TensorSet(adapter="nowhere")], sgd=pb.Sgd(learning_rate=1.0))
    strange = pb.ParamGroup(sets=[pb.TensorSet(adapter="default", tensors=1 << 12)], sgd=pb.Sgd(learning_rate=1.0))
    absent = pb.ParamGroup(sets=[pb.TensorSet(adapter="default", tensors=1, layers=[0])], sgd=pb.Sgd(learning_rate=1.0))
    untouched = pb.ParamGroup(sets=[pb.TensorSet(adapter="default", layers=[0])], sgd=pb.Sgd(learning_rate=1.0))
    cases = [
        (spb.Step(step=1, groups=adam(beta2=2.0)), INVALID, "beta2, expected 0 <= beta2 < 1: 2.0"),
        (spb.Step(step=1), INVALID, "the step has no groups"),
        (spb.Step(step=1, groups=[pb.ParamGroup(sgd=pb.Sgd())]), INVALID, "names no tensors"),
        (spb.Step(step=1, groups=adam() + adam()), INVALID, "is in two groups"),
        (spb.Step(step=1, groups=[nowhere]), MISSING, "no adapter 'nowhere'; it has: default"),
        (spb.Step(step=1, groups=[strange]), INVALID, "expected bits of 0xfff"),
        (spb.Step(step=1, groups=[absent]), MISSING, "has tensors ['a_down', 'b_down'] in layer 0"),
        (spb.Step(step=1, groups=[untouched]), PHASE, "in layer 0 have no gradients"),
        (spb.Step(step=5, groups=adam()), PHASE, "step 5 was asked for, the next is 1"),
    ]
    for step, code, text in cases:
        got, message = member.ask(member.call_frames(Op.STEP, spb.RequestOpen(step=step)))
        assert got is code, message
        assert text in message


def test_an_older_stream_is_fenced_by_a_newer_one(member: RawMember) -> None:
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    first, old_call = member._incoming, member.call
    member.rejoin(resume=True, tickets=[ticket])
    assert (member.joined.resumed, member.joined.received) == (True, ticket)
    with pytest.raises(grpc.RpcError) as caught:
        next(first)
    assert caught.value.code() is ABORTED
    assert "epoch 2 replaces this stream" in caught.value.details()
    del old_call
    member.open()
    with pytest.raises(grpc.RpcError) as caught:
        member.join(epoch=2)
    assert caught.value.code() is ABORTED
    assert "epoch 2 of rank 0" in caught.value.details()
    member.rejoin(resume=True, tickets=[ticket])
    assert member.ask(member.backward_frames(member.take_id(), ticket))[0] is OK


def test_tickets_that_are_not_wanted_any_more_are_dropped_on_joining_again(member: RawMember) -> None:
    tickets = [member.take_id() for _ in range(3)]
    for ticket in tickets:
        assert member.ask(member.forward_frames(ticket))[0] is OK
    member.rejoin(resume=True, tickets=tickets[1:2])
    status = member.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert [m.tickets for run in status.runs if run.run == member.run for m in run.members] == [1]
    code, message = member.ask(member.backward_frames(member.take_id(), tickets[0]))
    assert (code, "released by its trainer while it had no connection" in message) == (PHASE, True)


def test_a_trainer_that_takes_over_starts_afresh(member: RawMember) -> None:
    """It owes nothing: credits are full, tickets of the other are gone."""
    ticket = member.take_id()
    for request_id in (ticket, *(member.take_id() for _ in range(member.joined.credit_requests - 1))):
        member.send(*member.forward_frames(request_id))
    for _ in range(member.joined.credit_requests):
        member.outcome()  # received and never acknowledged
    member.rejoin(resume=False)
    assert not member.joined.resumed
    status = member.stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)
    assert [m.tickets for run in status.runs if run.run == member.run for m in run.members] == [0]
    for _ in range(2 * member.joined.credit_requests):
        assert member.ask(member.forward_frames(member.take_id(), save=False))[0] is OK
    assert member.ask(member.backward_frames(member.take_id(), ticket))[0] is MISSING


def test_a_half_sent_request_may_be_sent_again(member: RawMember) -> None:
    request_id = member.take_id()
    frames = member.forward_frames(request_id)
    member.send(*frames[:2])
    member.rejoin(resume=True)
    assert member.joined.received == request_id - 1
    assert member.ask(member.forward_frames(request_id))[0] is OK


def test_one_ticket_in_two_backwards_at_once_counts_once(member: RawMember) -> None:
    ticket = member.take_id()
    assert member.ask(member.forward_frames(ticket))[0] is OK
    both = [member.take_id(), member.take_id()]
    for request_id in both:
        member.send(*member.backward_frames(request_id, ticket))
    assert [member.outcome()[0][0].type for _ in both] == [FrameType.RESULT, FrameType.ERROR]


def test_a_cancelled_request_has_an_outcome_and_changes_nothing(member: RawMember) -> None:
    """Even one that was to begin a new window: the gradients of the open one still count."""
    first, second = member.take_id(), member.take_id()
    for ticket in (first, second):
        assert member.ask(member.forward_frames(ticket))[0] is OK
    assert member.ask(member.backward_frames(member.take_id(), first))[0] is OK
    norm = _norm(member)
    request_id = member.take_id()
    frames = member.backward_frames(request_id, second, begin=True)
    member.send(frames[0], (member.header(FrameType.CANCEL, request_id), b""), *frames[1:])
    header, payload = member.outcome()[0]
    assert header.type is FrameType.ERROR
    assert spb.ErrorDetail.FromString(payload).code == grpc.StatusCode.CANCELLED.value[0]
    member.acknowledge(request_id)
    late = member.backward_frames(member.take_id(), second, begin=True, deadline_ms=1)
    assert member.ask(late)[0] in (DEADLINE, OK)
    assert _norm(member) > 0 < norm


def test_unacknowledged_errors_do_not_pile_up(member: RawMember) -> None:
    for _ in range(10 * member.joined.credit_requests):
        member.send(member.forward_frames(member.take_id(), layer=99)[0])
    error = member.stream_error()
    assert error.code() is INVALID
    assert "acknowledge them as they come" in error.details()


def test_a_missing_member_is_named_when_the_deadline_passes(server: ServerProcess) -> None:
    with RawMember(server.address, f"pair-{uuid.uuid4().hex}", world_size=3, rank=1) as member:
        step = spb.RequestOpen(step=spb.Step(step=1, groups=adam()))
        code, details = member.ask(member.call_frames(Op.STEP, step, deadline_ms=200))
        assert code is DEADLINE
        assert "step 1 waited 0.2 s for ranks [0, 2] of 3; nothing was applied" in details
        assert member.ask(member.forward_frames(member.take_id()))[0] is OK
        member.leave()


def test_the_norm_may_be_asked_for_while_others_wait_for_the_step(server: ServerProcess) -> None:
    name = f"pair-{uuid.uuid4().hex}"
    with RawMember(server.address, name, world_size=2) as zero, RawMember(server.address, name, world_size=2, rank=1) as one:
        step = spb.RequestOpen(step=spb.Step(step=1, groups=adam()))
        zero.send(*zero.call_frames(Op.STEP, step))
        assert (
            one.ask(one.call_frames(Op.GRAD_NORM, spb.RequestOpen(grad_norm=spb.GradNorm(sets=GRADIENTS, order=2.0))))[0] is OK
        )
        assert one.ask(one.call_frames(Op.STEP, step))[0] is OK
        assert spb.ResultHead.FromString(zero.outcome()[0][1]).step == one.head.step == 1


def test_uploads_are_checked_before_they_count(member: RawMember) -> None:
    shape = (EXPERTS * 4, 24)

    def put(
        values: np.ndarray, tensor: str = "a_down", part: int = pb.ADAPTER_PART_PARAMETER, **fields: int
    ) -> tuple[object, str]:
        request_id = member.take_id()
        name = spb.TensorName(tensor=tensor, part=part)  # type: ignore[arg-type]  # values that are none too
        about = {"op": Op.WRITE_TENSOR, "rows": values.shape[0], "columns": values.shape[1], **fields}
        opened = spb.RequestOpen(write_tensor=name).SerializeToString()
        header = member.header(FrameType.REQUEST, request_id, **about)
        return member.ask([(header, opened), member.tensor(request_id, Tensor.ADAPTER, Dtype.FP32, values, Op.WRITE_TENSOR)])

    good = np.zeros(shape, np.float32)
    assert put(good, layer=2)[0] is MISSING
    assert put(good, tensor="a_up")[0] is MISSING
    assert put(good, part=0)[0] is INVALID
    assert "has shape (32, 23), expected 8 times 4 rows of 24" in put(np.zeros((shape[0], 23), np.float32))[1]
    assert "not finite" in put(np.full(shape, np.nan, np.float32))[1]
    assert put(good)[0] is OK
