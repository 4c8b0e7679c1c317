"""A named run that was there before this trainer was started: its adapters hold what was trained then."""

from __future__ import annotations

import re

from kt_expert_client.errors import InvalidRequest, WrongPhase
from kt_expert_client.options import RunOptions
from kt_expert_client.run import Run

_COPY = re.compile(r".*\.copy\d+")  # of an earlier start's objects


def meet_existing(run: Run, options: RunOptions) -> dict[str, frozenset[int]]:
    """The adapters of an earlier start that this one goes on with, and their layers; they keep their values.

    Raises WrongPhase where nobody said what is to become of them, InvalidRequest for a choice that the run cannot have.
    """
    old = {} if run.created else run.adapters.old()
    kept = {name: layers for name, layers in old.items() if _COPY.fullmatch(name) is None}
    if not old:
        return {}
    if options.existing == "refuse":
        raise WrongPhase(
            f"run {run.name!r} has adapters of an earlier start on the server, after {run.steps_taken} steps: "
            f"{', '.join(kept) or ', '.join(old)}. RunOptions(existing='keep') (KT_EXPERT_EXISTING=keep) goes on with their "
            "values, existing='replace' begins anew; or give the run another name"
        )
    if options.lora_location == "trainer" and options.existing == "keep":
        raise InvalidRequest(
            f"run {run.name!r} has adapters of an earlier start, and lora_location='trainer' keeps their values here: load "
            "them from the file they were saved to, with existing='replace'"
        )
    if options.existing == "replace" and run.world_size > 1:
        raise InvalidRequest(
            f"existing='replace' is for one rank, and run {run.name!r} has {run.world_size}; end the run first "
            f"(kt-expert runs close {run.name})"
        )
    gone = old if options.existing == "replace" else set(old) - set(kept)
    for name in gone:
        run.adapters.delete(name)
    if options.existing == "replace":
        run.set_steps(0)
        return {}
    return kept
