"""Plays schedules from a first seed on, over all cores, and plants the canaries: python -m simulation SEEDS FIRST."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import sys
import time
import traceback

from simulation.canaries import CANARIES
from simulation.planting import planted
from simulation.schedule import LENGTHS, MICRO_BATCHES, Result, SimulationError, count_undisturbed, play, undisturbed
from simulation.training import Plan

_CHUNK = 20
_CANARY_FIRST = 1_000_000  # seeds of the canaries: always the same, so that a change that blinds the simulator is seen
_MOST_RUNS, _MOST_RANKS = 2, 3


def _play(seed: int) -> Result | str:
    try:
        return play(seed)
    except SimulationError as error:
        return str(error)
    except Exception:  # whatever it is, the seed must be told
        return f"seed {seed}: {traceback.format_exc()}"


def _hunt(index: int) -> tuple[int, int]:
    """How many seeds a canary took to be caught; 0 where it survived its budget."""
    canary = CANARIES[index]
    known, taken = count_undisturbed(), 0
    with planted(canary):
        for count in range(canary.budget):
            try:
                play(_CANARY_FIRST + count)
            except Exception:  # caught, by an assertion or by falling over
                taken = count + 1
                break
    assert count_undisturbed() == known, "an undisturbed training was computed with a canary in it"
    return index, taken


def _prepare() -> None:
    """The undisturbed results, made before anything is planted."""
    shapes = itertools.product(range(_MOST_RUNS), range(1, _MOST_RANKS + 1), LENGTHS, MICRO_BATCHES, (False, True))
    for run, world_size, steps, micro_batches, drops in shapes:
        for edits in (False, True) if world_size == 1 else (False,):
            undisturbed(Plan(run, 0, world_size, steps, micro_batches, replay=False, drops=drops, edits=edits))
        if not drops:
            undisturbed(Plan(run, 0, world_size, steps, micro_batches, replay=False, adapters=True))
            undisturbed(Plan(run, 0, world_size, steps, micro_batches, replay=False, weights=True))


def main(seeds: int, first: int) -> int:
    begun = time.monotonic()
    _prepare()
    gc.freeze()  # what is loaded by now stays: looking through it again and again costs a sixth of the time
    differing: list[str] = []
    results: list[Result] = []
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        hunts = pool.map_async(_hunt, range(len(CANARIES)), 1)
        for outcome in pool.imap_unordered(_play, range(first, first + seeds), _CHUNK if seeds > _CHUNK else 1):
            if isinstance(outcome, str):
                differing.append(outcome)
                print(outcome, file=sys.stderr, flush=True)
            else:
                results.append(outcome)
        taken = dict(hunts.get())
    for index, canary in enumerate(CANARIES):
        how = f"caught after {taken[index]} schedules" if taken[index] else f"SURVIVED {canary.budget} schedules"
        print(f"canary: {canary.name}: {how}")
    spent = time.monotonic() - begun
    virtual = sum(each.virtual_s for each in results)
    print(
        f"{sum(each.events for each in results)} events, {sum(each.connections for each in results)} connections, "
        f"{sum(each.server_kills for each in results)} deaths of the server, "
        f"{sum(each.server_stops for each in results)} stops of it, "
        f"{sum(each.trainer_kills for each in results)} of trainers, {sum(each.losses for each in results)} losses told, "
        f"{sum(each.shared_batches for each in results)} batches computed with others'; "
        f"{virtual:.0f} s of virtual time in {spent:.0f} s ({virtual / max(spent, 1e-9):.0f} to 1)"
    )
    caught = sum(count > 0 for count in taken.values())
    print(f"schedules: {seeds}, differing {len(differing)}, canaries: caught {caught} of {len(CANARIES)}")
    return 1 if differing or caught < len(CANARIES) else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
