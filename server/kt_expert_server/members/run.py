"""Runs and their members: what lives on the server between requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kt_expert_proto.lora import LayerLora

from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.adapters.run_config import RunConfig
from kt_expert_server.adapters.sizes import TrainingBytes
from kt_expert_server.adapters.window import Windows
from kt_expert_server.checkpoints.manifest import MemberMark
from kt_expert_server.engine.buffers import TensorMemory
from kt_expert_server.engine.fast_path import FastForwards
from kt_expert_server.engine.passes import Trained
from kt_expert_server.engine.tickets import Tickets
from kt_expert_server.members.barrier import Barrier
from kt_expert_server.members.credits import Credits
from kt_expert_server.members.lease import Lease
from kt_expert_server.members.replay_log import ReplayLog

NOBODY = ""  # the identity of a trainer where no tokens are asked for


@dataclass(eq=False, slots=True)
class Member:
    """One rank of a run, held by one trainer process, its instance."""

    run: Run
    rank: int
    instance: str
    lease: Lease
    credits: Credits
    log: ReplayLog
    tickets: Tickets
    windows: Windows
    born: int  # epoch of the join that made it
    epoch: int = 0
    stream: int | None = None
    memory: TensorMemory | None = None  # where its trainer sees outcomes without their being sent
    fast: FastForwards | None = None  # what its trainer may ask of the engine past all else
    is_leaving: bool = False
    is_gone: bool = False
    lapse_was_told: bool = False  # to those who wait for it
    durable: int = 0  # its requests up to here survive the server's death
    included: int = 0  # the run's state held its requests up to here when this member was made

    @property
    def acknowledged(self) -> int:
        """No outcome up to here is needed any more: its trainer has them, or they went with a state that was restored."""
        return max(self.included, self.log.acknowledged)

    @property
    def last_settled(self) -> int:
        """The run's state has held the effects of its requests up to here."""
        return max(self.included, self.log.last_settled)

    @property
    def trained(self) -> Trained:
        run = self.run
        return Trained(
            run.name, run.adapters, self.windows, self.tickets, run.config.tickets, run.training, self.memory, self.fast
        )  # fmt: skip

    def detach(self) -> None:
        """Its stream has ended."""
        self.lose_fast()
        self.stream = self.memory = None

    def lose_fast(self) -> None:
        """Its trainer may ask nothing of the engine past the core any more."""
        if self.fast is not None:
            self.fast.revoke()
            self.fast = None

    def __str__(self) -> str:
        return f"rank {self.rank} of run {self.run.name!r}"


@dataclass(eq=False, slots=True)
class Run:
    """One fine-tuning job on the loaded base model."""

    name: str
    config: RunConfig
    ephemeral: bool
    owner: str  # the identity that opened it
    opened_by: str  # the instance that made it
    created: float
    adapters: dict[str, Adapter]
    training: Callable[[Sequence[LayerLora]], TrainingBytes]  # what training such layers takes
    barrier: Barrier
    step: int = 0
    writes: dict[str, int] = field(default_factory=dict)  # by adapter: the highest number its members count writes with
    members: dict[int, Member] = field(default_factory=dict)
    # By rank: the adapter holds the effects of this trainer's requests up to here, and none of its open window.
    marks: dict[int, MemberMark] = field(default_factory=dict)
    durable_marks: dict[int, MemberMark] = field(default_factory=dict)  # of the newest state on disk
    snapshots: int = 0  # taken so far; the sequence of the last one
    written_since_step: bool = False  # tensors were written that a replay of this window would meet too early
    changed_since_snapshot: bool = False
    snapshot_at: float = 0.0  # when the last one was taken, or the run was made
    loading: str = ""  # the checkpoint that is being loaded
    is_stepping: bool = False  # all members have met and the optimizer's step waits for the engine or runs
    empty_since: float | None = None  # when its last member went
    is_closed: bool = False

    @property
    def is_quiescent(self) -> bool:
        """No gradients are under way and nothing waits for a backward."""
        return all(member.windows.is_empty and not len(member.tickets) for member in self.members.values())

    def old_adapters(self) -> list[str]:
        """Those of an earlier start: none of the trainers that are connected made them."""
        here = {member.instance for member in self.members.values() if member.stream is not None}
        return sorted(name for name, adapter in self.adapters.items() if adapter.maker not in here)

    def windows(self) -> dict[int, Windows]:
        """In rank order."""
        return {rank: self.members[rank].windows for rank in sorted(self.members)}
