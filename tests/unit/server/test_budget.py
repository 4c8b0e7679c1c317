"""The memory budget, and the pool of buffers that gives way to it."""

from __future__ import annotations

import kt_expert_native as native
import numpy as np
import pytest
from kt_expert_proto.dtypes import Dtype
from kt_expert_server.engine.budget import Holdings, MemoryBudget
from kt_expert_server.engine.buffers import BufferPool
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import OutOfCapacity

MIB = 1024**2


def test_the_budget_refuses_with_its_numbers() -> None:
    budget = MemoryBudget(1000)
    weights = budget.reserve(Kind.WEIGHTS, 600, "server", "weights")
    with pytest.raises(OutOfCapacity, match="a ticket needs 500 B and 400 B of the limit of 1000 B are free"):
        budget.reserve(Kind.TICKETS, 500, "run", "a ticket")
    held = Holdings()
    held.add(budget.reserve(Kind.SCRATCH, 400, "run", "scratch"))
    assert (budget.total, budget.owned("run"), budget.owned("server")) == (1000, 400, 600)
    held.release()
    held.release()
    assert (budget.total, budget.owned("run")) == (600, 0)
    weights.shrink(100)
    assert budget.total == budget.reserved(Kind.WEIGHTS) == budget.owned("server") == 100
    weights.release()
    weights.release()
    assert budget.total == 0


def test_memory_of_past_tickets_is_counted_and_gives_way() -> None:
    engine = native.Engine(1)
    budget = MemoryBudget(32 * MIB, [engine])
    tokens, hidden = 1024, 512
    x, ids = np.zeros((tokens, hidden), np.float32), np.zeros((tokens, 1), np.int32)
    weights, routing_weights = native.LayerWeights(native.LayerSpec(1, hidden, 8)), np.ones((tokens, 1), np.float32)
    ticket = engine.forward(weights, None, x, ids, routing_weights, np.empty_like(x), "activations")
    scratch = budget.reserved(Kind.KEPT)
    assert 0 < scratch <= engine.scratch_bytes(weights.spec, native.AdapterSpec(), tokens, 1)
    del ticket
    assert budget.reserved(Kind.KEPT) == budget.total == scratch + 2 * MIB  # the tokens; the rest is too small to be kept
    budget.reserve(Kind.ADAPTERS, 30 * MIB - scratch, "run", "an adapter")
    assert budget.total == 32 * MIB
    with pytest.raises(OutOfCapacity, match=r"MiB of the limit of 32.0 MiB are free"):
        budget.reserve(Kind.ADAPTERS, scratch + 2 * MIB + 1, "run", "another")
    budget.reserve(Kind.ADAPTERS, scratch + 2 * MIB, "run", "another")
    assert budget.reserved(Kind.KEPT) == 0
    assert budget.total == 32 * MIB


def test_buffers_are_aligned_used_again_and_give_way() -> None:
    pool = BufferPool()
    budget = MemoryBudget(4 * MIB, [pool])
    first = pool.take(MIB)
    array = first.array(Dtype.FP32, 512, 512)
    assert array.ctypes.data % 64 == 0
    array[...] = 3.0
    first.release()
    assert budget.reserved(Kind.KEPT) == MIB
    again = pool.take(MIB - 4096)
    assert (len(again.view), pool.kept_bytes) == (MIB - 4096, 0)
    assert again.array(Dtype.FP32, 1, 1)[0, 0] == 3.0
    again.release()
    small = pool.take(MIB // 4)  # a buffer four times its size is not spent on it
    assert pool.kept_bytes == MIB
    budget.reserve(Kind.ADAPTERS, 4 * MIB, "run", "an adapter")
    assert pool.kept_bytes == 0
    small.release()
    with pytest.raises(AssertionError, match="released twice"):
        small.release()
    with pytest.raises(AssertionError, match="was used"):
        small.view  # noqa: B018


@pytest.mark.parametrize("size", [0, 1, 63, 4095, 4096])
def test_a_buffer_is_as_long_as_asked(size: int) -> None:
    buffer = BufferPool().take(size)
    assert len(buffer.view) == size
    buffer.release()
