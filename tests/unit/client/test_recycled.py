"""Memory of large results: used again once no tensor has it, and never before."""

from __future__ import annotations

import gc

import torch
from kt_expert_client.recycled import RecycledMemory

MIB = 1024 * 1024


def test_it_serves_the_next_tensor_once_nobody_has_it() -> None:
    memory = RecycledMemory()
    first = memory.take(4 * MIB)
    address = first.data_ptr()
    view = first[:MIB].view(torch.float32)
    del first
    other = memory.take(4 * MIB)
    assert other.data_ptr() != address, "a view of it was still there"
    view[:] = 1.0
    other[:] = 0
    assert bool((view == 1.0).all())
    del view
    gc.collect()
    assert memory.take(3 * MIB).data_ptr() == address


def test_much_smaller_and_larger_tensors_get_others() -> None:
    memory = RecycledMemory()
    first = memory.take(8 * MIB)
    address = first.data_ptr()
    del first
    kept = [memory.take(3 * MIB), memory.take(9 * MIB)]
    assert all(each.data_ptr() != address for each in kept)
    assert memory.take(8 * MIB).data_ptr() == address


def test_what_is_kept_is_bounded() -> None:
    memory = RecycledMemory()
    taken = [memory.take(size * MIB) for size in (90, 100, 110)]
    del taken
    small = memory.take(MIB)
    assert sum(each.nbytes for each in memory._kept) <= 256 * MIB
    assert {each.nbytes for each in memory._kept} == {100 * MIB, 110 * MIB}
    del small


def test_small_ones_are_malloc_s_own() -> None:
    memory = RecycledMemory()
    first = memory.take(1000)
    del first
    assert memory._returned.empty()
