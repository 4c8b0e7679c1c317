"""What a trainer does whose server does not know it any more: repeat what was lost, or say what it was.

The server was killed and has the state of a checkpoint, or it gave the member up. Its answer to JOIN says which of this
trainer's requests that state includes; tickets, gradients and outcomes are gone.
"""

from __future__ import annotations

from kt_expert_proto.v1.session_pb2 import Joined

from kt_expert_client.errors import RunStateLost
from kt_expert_client.session.calls import Call
from kt_expert_client.session.journal import Journal


def requests_to_repeat(joined: Joined, journal: Journal, origin_step: int, *, is_beyond: bool) -> list[Call] | None:
    """What brings the server to where this trainer is; None where nothing can.

    `origin_step` is the run's step when this trainer came. `is_beyond`: the state came after requests whose outcomes this
    trainer still lacks, and which can therefore not be computed any more.
    """
    # Without a request of this trainer's in it, the state must be the one that was there when it came.
    is_other = not joined.included and joined.step != origin_step
    if is_beyond or is_other:
        return None
    if not journal.lost(joined.included):
        return []
    return journal.to_repeat(joined.included) if journal.can_repeat(joined.included) else None


def loss_of(joined: Joined, journal: Journal, rank: int, run: str) -> RunStateLost:
    """What a trainer is told that cannot be brought back to where it was."""
    if journal.overflowed:
        why = "more came since its last checkpoint than replay_window may keep"
    else:
        why = "with replay_window this trainer would have repeated it"
    return RunStateLost(
        f"the server lost what rank {rank} of run {run!r} did after step {joined.step}; go on from step {joined.step} ({why})",
        step=joined.step,
    )
