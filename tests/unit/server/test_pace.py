"""How often an identity may call."""

from __future__ import annotations

import asyncio

import pytest
from kt_expert_server.edge.pace import BURST_S, MOST_WAIT_S, Pace
from kt_expert_server.errors import OutOfCapacity

PER_SECOND = 4.0
BURST = int(PER_SECOND * BURST_S)


class Clock:
    """Time that passes where somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []
        self.excess = 0

    def waits(self) -> None:
        self.excess += 1

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def pace(self) -> Pace:
        return Pace(PER_SECOND, self.waits, lambda: self.now, self.sleep)


def call(pace: Pace, times: int, identity: str | None = "one") -> None:
    async def calls() -> None:
        for _ in range(times):
            await pace.turn(identity)

    asyncio.run(calls())


def test_a_burst_is_free_and_what_follows_comes_at_the_rate() -> None:
    clock = Clock()
    pace = clock.pace()
    call(pace, BURST)
    assert not clock.slept
    assert not clock.excess
    call(pace, 10)
    assert clock.excess == 10
    assert clock.now == pytest.approx(100.0 + 10 / PER_SECOND)


def test_what_was_used_comes_back_with_time() -> None:
    clock = Clock()
    pace = clock.pace()
    call(pace, BURST)
    clock.now += BURST_S
    call(pace, BURST)
    assert not clock.slept


@pytest.mark.parametrize("other", ["two", "", None])
def test_identities_do_not_wait_for_each_other(other: str | None) -> None:
    clock = Clock()
    pace = clock.pace()
    call(pace, BURST + 1)
    assert len(clock.slept) == 1
    call(pace, BURST, other)
    assert len(clock.slept) == 1


def test_calls_that_were_made_already_are_paid_for_by_the_next() -> None:
    clock = Clock()
    pace = clock.pace()
    for _ in range(BURST + 8):
        pace.charge("one")
    assert not clock.slept
    asyncio.run(pace.settle("one"))
    assert clock.now == pytest.approx(100.0 + 8 / PER_SECOND)
    for _ in range(100_000):
        pace.charge("one")
    clock.now += MOST_WAIT_S
    call(pace, 1)  # however many they were


def test_the_first_call_is_free_at_any_rate() -> None:
    clock = Clock()
    pace = Pace(0.01, clock.waits, lambda: clock.now, clock.sleep)
    call(pace, 1)
    assert not clock.slept


def test_callers_that_have_gone_are_forgotten() -> None:
    clock = Clock()
    pace = clock.pace()
    for number in range(20_000):
        pace.charge(f"host {number}")
        clock.now += 0.01
    assert len(pace._used_up_at) < 5000


def test_who_does_not_wait_is_refused_with_a_time_to_come_back() -> None:
    clock = Clock()
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)  # all at the same time

    pace = Pace(PER_SECOND, clock.waits, lambda: clock.now, wait)
    with pytest.raises(OutOfCapacity, match="more than 4 calls a second") as caught:
        call(pace, 1000)
    assert caught.value.retry_delay_s > 0
    assert max(waits) <= caught.value.retry_delay_s
    clock.now += caught.value.retry_delay_s
    call(pace, 1)
