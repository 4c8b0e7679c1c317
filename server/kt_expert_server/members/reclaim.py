"""Memory where none is free: from whom it may be taken, and when more will be there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kt_expert_server.engine.budget import MemoryBudget, Reservation
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.errors import OutOfCapacity, OverQuota
from kt_expert_server.members.dispatch import Dispatch
from kt_expert_server.members.run import Member, Run
from kt_expert_server.members.scheduler import Job

_BUSY_RETRY_S = 1.0  # for others to run a backward


class Reclaim:
    """`remove` gives up a member and all it holds."""

    def __init__(
        self, dispatch: Dispatch, budget: MemoryBudget, runs: Mapping[str, Run], remove: Callable[[Member], None]
    ) -> None:  # fmt: skip
        self._dispatch, self._budget, self._runs, self._remove = dispatch, budget, runs, remove

    def reserve(self, kind: Kind, size_bytes: int, owner: str, what: str) -> Reservation:
        """As the budget does, taking from members and runs that nobody holds any more where it has to. An error says when
        more may be free."""
        while True:
            try:
                return self._budget.reserve(kind, size_bytes, owner, what)
            except OutOfCapacity as error:
                if isinstance(error, OverQuota) or not self.one():
                    raise self.with_retry(error, owner) from None

    def for_job(self, job: Job) -> bool:
        """As reserve() does, for work that is about to run; not from the member whose work it is."""
        run = self._runs.get(job.run)
        return self.one(None if run is None else run.members.get(job.rank))

    def one(self, but: Member | None = None) -> bool:
        """Gives up what has been without a trainer for longest. False where there is nothing of the kind."""
        lapsed = [
            member
            for member in self._members
            if member is not but
            and member.lease.is_over(self._dispatch.now)
            and not self._dispatch.is_at_work(member.run.name, member.rank)
        ]
        if lapsed:
            oldest = min(lapsed, key=lambda member: (member.lease.ends or 0.0, member.run.name, member.rank))
            self._dispatch.note(f"{oldest} has no connection and its memory is needed: it is given up")
            self._remove(oldest)
            return True
        return False

    def with_retry(self, error: OutOfCapacity, owner: str) -> OutOfCapacity:
        """The same error, with the time after which that run may ask again, where there is one."""
        now, others = self._dispatch.now, self._others(error, owner)
        waiting = [(left, member) for member in others if (left := member.lease.left_s(now)) is not None]
        if waiting:
            left, member = min(waiting, key=lambda entry: entry[0])
            return OutOfCapacity(
                f"{error}; {member} has no connection, and its memory is free in {left:.0f} s if it does not return",
                retry_delay_s=max(left, _BUSY_RETRY_S),
            )
        if 0 < error.missing_bytes <= sum(member.tickets.size_bytes for member in others):
            return type(error)(
                f"{error}; other trainers' tickets take as much and may soon be given back", retry_delay_s=_BUSY_RETRY_S
            )
        return error

    def _others(self, error: OutOfCapacity, owner: str) -> list[Member]:
        """Whose memory would help that run: what belongs to it is its own to give back."""
        members = [member for member in self._members if member.run.name != owner]
        if isinstance(error, OverQuota):
            identity = self._budget.quotas.identity_of(owner)
            return [member for member in members if member.run.owner == identity]
        return members

    @property
    def _members(self) -> list[Member]:
        return [member for run in self._runs.values() for member in run.members.values()]
