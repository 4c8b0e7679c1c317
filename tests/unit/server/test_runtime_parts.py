"""The runtime's small parts: barrier, budget, names, step agreement, addresses."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Mapping

import kt_expert_native as native
import numpy as np
import pytest
from kt_expert_server.config import Address
from kt_expert_server.errors import DeadlinePassed, InvalidRequest, OutOfCapacity, RequestCancelled, WrongPhase
from kt_expert_server.runtime.barrier import Barrier
from kt_expert_server.runtime.engine_queue import EngineQueue
from kt_expert_server.runtime.memory import Kind, MemoryBudget
from kt_expert_server.runtime.names import check_name
from kt_expert_server.runtime.optimizer import TENSORS, ParamGroup, StepParams, agreed_params

MIB = 1024**2


async def total(arrivals: Mapping[int, int]) -> int:
    return sum(arrivals.values())


def test_a_round_completes_when_all_have_arrived() -> None:
    async def scenario() -> None:
        barrier: Barrier[int, int] = Barrier("sum", 3)
        first = await asyncio.gather(*(barrier.arrive(rank, 1, rank + 1, 5, total) for rank in range(3)))
        assert first == [6, 6, 6]
        assert await barrier.arrive(1, 1, 99, 5, total) == 6  # the stored result, not a new round
        with pytest.raises(WrongPhase, match="sum 3 was asked for, the next is 2"):
            await barrier.arrive(0, 3, 1, 5, total)

    asyncio.run(scenario())


def test_a_rank_that_gave_up_does_not_count() -> None:
    async def scenario() -> None:
        barrier: Barrier[int, int] = Barrier("sum", 2)
        with pytest.raises(DeadlinePassed, match=r"for ranks \[1\] of 2"):
            await barrier.arrive(0, 1, 5, 0.01, total)
        late = asyncio.ensure_future(barrier.arrive(1, 1, 7, 5, total))
        await asyncio.sleep(0)
        assert await barrier.arrive(0, 1, 6, 5, total) == 13
        assert await late == 13

    asyncio.run(scenario())


def test_a_failed_action_reaches_every_rank_and_can_be_tried_again() -> None:
    async def fail(_: Mapping[int, int]) -> int:
        raise InvalidRequest("no")

    async def scenario() -> None:
        barrier: Barrier[int, int] = Barrier("sum", 2)
        results = await asyncio.gather(*(barrier.arrive(rank, 1, 1, 5, fail) for rank in range(2)), return_exceptions=True)
        assert all(isinstance(result, InvalidRequest) for result in results)
        assert await asyncio.gather(*(barrier.arrive(rank, 1, 1, 5, total) for rank in range(2))) == [2, 2]

    asyncio.run(scenario())


def test_a_cancelled_caller_neither_stops_nor_repeats_the_action() -> None:
    runs = []

    async def slow(arrivals: Mapping[int, int]) -> int:
        runs.append(1)
        await asyncio.sleep(0.05)
        return sum(arrivals.values())

    async def scenario() -> None:
        barrier: Barrier[int, int] = Barrier("sum", 1)
        caller = asyncio.ensure_future(barrier.arrive(0, 1, 5, 5, slow))
        await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(DeadlinePassed, match="all ranks have arrived and it is still running"):
            await barrier.arrive(0, 1, 99, 0.01, slow)
        assert await barrier.arrive(0, 1, 99, 5, slow) == 5
        assert await barrier.arrive(0, 1, 99, 5, slow) == 5
        assert runs == [1]

    asyncio.run(scenario())


def test_a_cancelled_rank_no_longer_counts_as_arrived() -> None:
    async def scenario() -> None:
        barrier: Barrier[int, int] = Barrier("sum", 2)
        gone = asyncio.ensure_future(barrier.arrive(0, 1, 5, 5, total))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        with pytest.raises(DeadlinePassed, match=r"for ranks \[0\] of 2"):
            await barrier.arrive(1, 1, 7, 0.01, total)
        with barrier.held("an adapter is being loaded"):
            barrier.restart(4)
        assert barrier.completed == 4

    asyncio.run(scenario())


def test_ranks_that_wait_hear_when_the_run_is_closed() -> None:
    async def scenario() -> None:
        barrier: Barrier[int, int] = Barrier("sum", 2)
        waiting = asyncio.ensure_future(barrier.arrive(0, 1, 5, 5, total))
        await asyncio.sleep(0)
        barrier.abort(WrongPhase("closed"))
        with pytest.raises(WrongPhase, match="closed"):
            await waiting

    asyncio.run(scenario())


def test_no_round_begins_while_the_barrier_is_held() -> None:
    async def scenario() -> None:
        barrier: Barrier[int, int] = Barrier("sum", 2)
        waiting = asyncio.ensure_future(barrier.arrive(0, 1, 5, 5, total))
        await asyncio.sleep(0)
        with pytest.raises(WrongPhase, match="sum 1 is under way"), barrier.held("a is being loaded"):
            pass
        assert await barrier.arrive(1, 1, 6, 5, total) == await waiting == 11
        with barrier.held("a is being loaded"):
            assert await barrier.arrive(1, 1, 6, 5, total) == 11  # the last one's result is still told
            with pytest.raises(WrongPhase, match="sum 2 came while a is being loaded"):
                await barrier.arrive(0, 2, 5, 5, total)
            with pytest.raises(WrongPhase, match="a is being loaded already"), barrier.held("b"):
                pass
            barrier.restart(8)
        assert await asyncio.gather(*(barrier.arrive(rank, 9, rank, 5, total) for rank in range(2))) == [1, 1]

    asyncio.run(scenario())


def test_the_budget_refuses_with_its_numbers() -> None:
    budget = MemoryBudget(1000)
    budget.reserve(Kind.WEIGHTS, 600, "weights")
    with pytest.raises(OutOfCapacity, match="a ticket needs 500 B and 400 B of the limit of 1000 B are free"):
        budget.reserve(Kind.TICKETS, 500, "a ticket")
    with budget.held(Kind.SCRATCH, 400, "scratch"):
        assert budget.total == 1000
    assert budget.total == budget.reserved(Kind.WEIGHTS) == 600


def test_memory_of_past_tickets_is_counted_and_gives_way() -> None:
    engine = native.Engine(1)
    budget = MemoryBudget(32 * MIB, engine)
    tokens, hidden = 1024, 512
    x, ids = np.zeros((tokens, hidden), np.float32), np.zeros((tokens, 1), np.int32)
    weights, routing_weights = native.LayerWeights(native.LayerSpec(1, hidden, 8)), np.ones((tokens, 1), np.float32)
    ticket = engine.forward(weights, None, x, ids, routing_weights, np.empty_like(x), "activations")
    scratch = budget.reserved(Kind.KEPT)
    assert 0 < scratch <= engine.scratch_bytes(weights.spec, native.LoraSpec(), tokens, 1)
    del ticket
    assert budget.reserved(Kind.KEPT) == budget.total == scratch + 2 * MIB  # the tokens; the rest is too small to be kept
    budget.reserve(Kind.ADAPTERS, 30 * MIB - scratch, "an adapter")
    assert budget.total == 32 * MIB
    with pytest.raises(OutOfCapacity, match=r"MiB of the limit of 32.0 MiB are free"):
        budget.reserve(Kind.ADAPTERS, scratch + 2 * MIB + 1, "another")
    budget.reserve(Kind.ADAPTERS, scratch + 2 * MIB, "another")
    assert budget.reserved(Kind.KEPT) == 0
    assert budget.total == 32 * MIB


def test_a_failed_operation_keeps_nothing() -> None:
    """A refused backward must not hold its ticket until the garbage collector comes."""

    async def scenario() -> None:
        queue, held = EngineQueue(native.Engine(1)), np.zeros(1)
        alive = weakref.ref(held)

        def fail(held: np.ndarray = held) -> None:
            token = native.CancelToken()
            token.cancel()
            native.Engine(1).forward(
                native.LayerWeights(native.LayerSpec(1, 8, 8)), None, np.zeros((1, 8), np.float32),
                np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32), np.zeros((1, 8), np.float32), "nothing", token,
            )  # fmt: skip

        async with queue.turn():
            try:
                await queue.run(fail)
            except RequestCancelled:
                del fail, held
        deadline = time.monotonic() + 5  # the loop and the engine's thread hold what they have just handed over
        while alive() is not None and time.monotonic() < deadline:
            await asyncio.sleep(0.001)
        assert alive() is None
        queue.close()

    gc.disable()
    try:
        asyncio.run(scenario())
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["a", "run-1", "A.b_c-d", "0" * 128])
def test_good_names(name: str) -> None:
    assert check_name("run", name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "-a", "a b", "a\n", "ä", "0" * 129])
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidRequest, match="is not allowed"):
        check_name("run", name)


def test_members_must_agree_on_a_step() -> None:
    def params(rate: float, scale: float, kind: str = "adamw", *, new: bool = False) -> StepParams:
        return StepParams((ParamGroup((), kind, (("learning_rate", rate),)),), scale, new)

    ours, close = params(1e-3, 0.5), params(1e-3, 0.50001)
    assert agreed_params({0: ours, 1: close}) == ours
    for other in (params(2e-3, 0.5), params(1e-3, 0.6), params(1e-3, 0.5, "sgd"), params(1e-3, 0.5, new=True)):
        with pytest.raises(InvalidRequest, match="rank 1 asked for another step than rank 0"):
            agreed_params({0: ours, 1: other})


def group(*tensors: str, kind: str = "sgd", rate: float = 1.0) -> ParamGroup:
    return ParamGroup(tensors, kind, (("learning_rate", rate),))


def test_groups_cover_every_tensor_once() -> None:
    updates = StepParams((group("b_up", "b_gate", rate=2.0), group()), 1.0).updates()
    assert set(updates) == set(TENSORS)
    assert updates["b_up"] is updates["b_gate"]
    assert updates["a_up"] is updates["b_down"] is not updates["b_up"]
    assert StepParams((group(kind="adam"), group("a_up", kind="adamw")), 1.0).state_kind == "adamw"


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([group("a_up")], "no group of the step holds a_gate"),
        ([group("a_up"), group("a_up"), group()], "names tensor 'a_up' twice"),
        ([group("a_side"), group()], "names tensor 'a_side' twice, or it is none of"),
        ([group(), group()], "two groups of a step name no tensors"),
        ([group(), group("a_up", kind="adamw")], "a step mixes sgd and adamw"),
        ([group(rate=-1.0)], "lr, expected at least 0"),
    ],
)
def test_groups_without_a_meaning_are_refused(groups: list[ParamGroup], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        StepParams(tuple(groups), 1.0).updates()


def test_addresses() -> None:
    assert str(Address.parse("127.0.0.1:0")) == "127.0.0.1:0"
    assert Address.parse("[::1]:80") == Address("[::1]", 80)
    for text in ("", "host", ":80", "host:99999", "ho st:1", "host:-1"):
        with pytest.raises(InvalidRequest, match="is not host:port"):
            Address.parse(text)
