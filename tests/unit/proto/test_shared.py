"""Who may write and read where in memory that two processes see."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kt_expert_proto.header import FrameError
from kt_expert_proto.shared import GRANULE_BYTES, PLACE_BYTES, Allocator, Borrower, Place

PAGES = 16
SIZE = PAGES * GRANULE_BYTES


@given(st.lists(st.tuples(st.sampled_from(["take", "lend", "release", "free"]), st.integers(0, 40_000), st.integers(0, 15))))
def test_places_do_not_overlap_and_come_back(steps: list[tuple[str, int, int]]) -> None:
    """Whatever the order in which both sides let go."""
    writer, reader = Allocator(SIZE), Borrower(SIZE)
    owned: dict[int, int] = {}  # offset -> size, of those that the writer needs
    lent: dict[int, Place] = {}
    for action, size, pick in steps:
        if action == "take" and (offset := writer.take(size)) is not None:
            end = offset + max(size, 1)
            assert end <= SIZE
            assert all(end <= other or other + max(1, length) <= offset for other, length in owned.items())
            assert offset not in lent
            owned[offset] = size
        elif action == "lend" and owned and (place := writer.lend(sorted(owned)[pick % len(owned)])) is not None:
            reader.show(place, max(owned[place.offset], 1))
            lent[place.offset] = place
        elif action == "release" and owned:
            offset = sorted(owned)[pick % len(owned)]
            del owned[offset]
            writer.release(offset)
        elif action == "free" and lent:
            place = lent.pop(sorted(lent)[pick % len(lent)])
            reader.release(place)
            writer.freed(place)
    for place in lent.values():
        writer.freed(place)
    for offset in owned:
        writer.release(offset)
    assert writer.used_bytes == 0
    assert writer.take(SIZE) == 0, "what was given back has not become one again"


def test_a_region_that_is_full_says_so() -> None:
    writer = Allocator(SIZE)
    assert [writer.take(SIZE // 2), writer.take(SIZE // 2), writer.take(1)] == [0, SIZE // 2, None]


def _lent() -> tuple[Allocator, Place]:
    """A writer that has lent one place."""
    writer = Allocator(SIZE)
    offset = writer.take(100)
    assert offset is not None
    place = writer.lend(offset)
    assert place is not None
    return writer, place


def test_a_place_is_lent_once_at_a_time() -> None:
    writer, first = _lent()
    assert writer.lend(first.offset) is None
    writer.freed(first)
    assert writer.lend(first.offset) == Place(first.offset, 2)


@pytest.mark.parametrize(
    "place", [Place(0, 2), Place(GRANULE_BYTES, 1), Place(0, 0)], ids=["a later generation", "elsewhere", "not lent"]
)
def test_what_was_not_lent_cannot_be_given_back(place: Place) -> None:
    writer, _ = _lent()
    with pytest.raises(FrameError, match="is not lent"):
        writer.freed(place)


def test_a_place_is_given_back_once() -> None:
    writer, place = _lent()
    writer.freed(place)
    with pytest.raises(FrameError, match="is not lent"):
        writer.freed(place)


WRONG = {
    "behind the end": (Place(SIZE, 1), 1, "an end up to"),
    "over the end": (Place(SIZE - GRANULE_BYTES, 1), GRANULE_BYTES + 1, "an end up to"),
    "far away": (Place(2**64 - GRANULE_BYTES, 1), GRANULE_BYTES, "an end up to"),
    "not at a page": (Place(8, 1), 8, "the begin of a page"),
    "empty": (Place(0, 1), 0, "a tensor of 0 bytes"),
    "generation 0": (Place(0, 0), 8, "generation 0 of shared memory came after 0"),
}


@pytest.mark.parametrize(("place", "size", "text"), WRONG.values(), ids=WRONG.keys())
def test_a_place_that_cannot_be_is_refused(place: Place, size: int, text: str) -> None:
    with pytest.raises(FrameError, match=text):
        Borrower(SIZE).show(place, size)


def test_a_place_in_use_or_of_the_past_is_refused() -> None:
    reader = Borrower(SIZE)
    reader.show(Place(GRANULE_BYTES, 5), 2 * GRANULE_BYTES)
    with pytest.raises(FrameError, match="are still in use"):
        reader.show(Place(2 * GRANULE_BYTES, 6), 8)
    reader.release(Place(GRANULE_BYTES, 5))
    with pytest.raises(FrameError, match="generation 5 of shared memory came after 5"):
        reader.show(Place(GRANULE_BYTES, 5), 8)
    reader.show(Place(2 * GRANULE_BYTES, 6), 8)
    assert reader.held_places == 1


def test_a_place_of_another_size_is_no_place() -> None:
    place = Place(GRANULE_BYTES, 7)
    assert Place.unpack(place.pack()) == place
    for size in (0, PLACE_BYTES - 1, PLACE_BYTES + 1):
        with pytest.raises(FrameError, match=f"takes {PLACE_BYTES} bytes, got {size}"):
            Place.unpack(bytes(size))
