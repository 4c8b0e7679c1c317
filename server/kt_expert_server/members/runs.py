"""Opening, restoring, joining, leaving and closing runs, and what becomes of members that vanish."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import kt_expert_native as native
from kt_expert_proto.lora import DEFAULT_ADAPTER, LayerLora

from kt_expert_server.adapters.adapter import Adapter, AdapterLayer
from kt_expert_server.adapters.run_config import RunConfig, describe_differences, require_same_lora
from kt_expert_server.adapters.sizes import TrainingBytes, check_lora, layer_bytes
from kt_expert_server.adapters.window import Windows
from kt_expert_server.checkpoints.manifest import AdapterRecord, MemberMark
from kt_expert_server.checkpoints.work import ApplyWork
from kt_expert_server.engine.budget import Holdings, MemoryBudget, Reservation
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.tickets import Tickets
from kt_expert_server.engine.training_memory import reserve_all, training_sizes
from kt_expert_server.engine.work import Outcome, WholeWork
from kt_expert_server.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    NotPermitted,
    OutOfCapacity,
    ServerError,
    ServerUnavailable,
    StreamReplaced,
    WrongPhase,
)
from kt_expert_server.members.actions import EndStream
from kt_expert_server.members.barrier import Barrier
from kt_expert_server.members.credits import Credits
from kt_expert_server.members.dispatch import Dispatch
from kt_expert_server.members.lease import Lease
from kt_expert_server.members.limits import Limits
from kt_expert_server.members.reclaim import Reclaim
from kt_expert_server.members.replay_log import ReplayLog
from kt_expert_server.members.requests import Requests, vanished
from kt_expert_server.members.run import Member, Run
from kt_expert_server.members.saving import Restored, Saving
from kt_expert_server.members.scheduler import Job
from kt_expert_server.members.stopping import stopping
from kt_expert_server.model.loader import BaseModel
from kt_expert_server.names import check_name

_CLOSE_AGAIN_S = 60.0  # after a last checkpoint that failed: a disk is not emptied in less


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a JOIN asks for, checked field by field."""

    run: str
    config: RunConfig
    ephemeral: bool
    rank: int
    instance: str
    epoch: int
    born: int  # of the member this trainer knows itself to be; 0 for none
    takeover: bool
    identity: str


@dataclass(eq=False, slots=True)
class _Opening:
    """A run that is being made. Others see it when it is complete, or not at all."""

    wanted: Wanted
    reading: Holdings = field(default_factory=Holdings)  # what is read from the disk
    waiting: list[Callable[[Run | ServerError], None]] = field(default_factory=list)


class NewAdaptersWork(WholeWork):
    """Makes a run's first adapters and fills them: from the seed, or from a checkpoint."""

    def __init__(
        self, engine: native.Engine, model: BaseModel, run: str, config: RunConfig, records: Sequence[AdapterRecord],
        restored: Restored,
    ) -> None:  # fmt: skip
        super().__init__()
        self._engine, self._model = engine, model
        self._run, self._config, self._records, self._restored = run, config, records, restored
        self.adapters: dict[str, Adapter] = {}

    def run(self) -> None:
        adapters: dict[str, Adapter] = {}
        for record in self._records:
            adapter = adapters[record.name] = Adapter(record.name, self._config.moment_dtype, record.maker)
            adapter.is_trained = record.trainable
            for lora in record.lora:
                adapter.layers[lora.layer] = layer = AdapterLayer.make(self._model, lora, self._engine)
                if self._restored is None:
                    layer.initialise(self._config.seed)
                    layer.encode()
                layer.version = 1  # a copy of weights that may have been trained
        if self._restored is not None:
            ApplyWork(adapters, self._run, *self._restored).run()
        self.adapters = adapters

    def commit(self) -> Outcome:
        return Outcome()


class Runs:
    """Owns every run and member."""

    def __init__(
        self, dispatch: Dispatch, budget: MemoryBudget, limits: Limits, engine: native.Engine, saving: Saving,
    ) -> None:  # fmt: skip
        self.by_name: dict[str, Run] = {}
        self.is_draining = False
        self.is_stopping = False
        self._dispatch = dispatch
        self._budget = budget
        self._limits = limits
        self._engine = engine
        self._saving = saving
        self._openings: dict[str, _Opening] = {}
        self.reclaim = Reclaim(dispatch, budget, self.by_name, self.remove)
        self.requests: Requests  # set by the core: requests and runs know each other

    @property
    def members(self) -> list[Member]:
        return [member for run in self.by_name.values() for member in run.members.values()]

    def named(self, name: str, identity: str) -> Run:
        """Raises NotFound, or NotPermitted for a run of another identity."""
        run = self.by_name.get(name)
        if run is None:
            known = ", ".join(sorted(each.name for each in self.by_name.values() if each.owner == identity)) or "none"
            raise NotFound(f"run {name!r} is not open; open runs: {known}")
        if run.owner != identity:
            raise NotPermitted(f"run {name!r} belongs to another identity")
        return run

    def open(self, wanted: Wanted, model: BaseModel, done: Callable[[Run | ServerError], None]) -> None:
        """The run of that name: as it is, restored from disk, or new. `done` is called once, perhaps later."""
        try:
            check_name("run", wanted.run)
            run = self.by_name.get(wanted.run)
            if run is not None:
                self._require_same(wanted, run.owner, run.config)
                done(run)
                return
            opening = self._openings.get(wanted.run)
            if opening is not None:
                self._require_same(wanted, opening.wanted.identity, opening.wanted.config)
                opening.waiting.append(done)
                return
            self._require_accepting()
            check_lora(model, wanted.config.lora)
        except ServerError as error:
            done(error)
            return
        self._budget.quotas.belongs(wanted.run, wanted.identity)
        opening = _Opening(wanted, waiting=[done])
        self._openings[wanted.run] = opening
        self._saving.find_restart_point(
            wanted.run, wanted.identity, opening.reading, lambda found: self._found(opening, model, found)
        )

    @staticmethod
    def _require_same(wanted: Wanted, owner: str, config: RunConfig) -> None:
        if owner != wanted.identity:
            raise NotPermitted(f"run {wanted.run!r} belongs to another identity")
        differences = describe_differences(config, wanted.config)
        if differences:
            raise AlreadyExists(
                f"run {wanted.run!r} exists with another configuration: {differences}; choose another name or close it"
            )

    def _require_accepting(self, run: Run | None = None) -> None:
        if self.is_stopping:
            raise stopping()
        if self.is_draining:
            raise ServerUnavailable("the server is draining and takes no new runs or members; connect to another one")
        if run is not None and run.is_closed:
            raise NotFound(f"run {run.name!r} was closed")

    def _found(self, opening: _Opening, model: BaseModel, found: Restored | ServerError) -> None:
        wanted = opening.wanted
        default = AdapterRecord(DEFAULT_ADAPTER, wanted.config.lora, trainable=True, maker=wanted.instance)
        records: Sequence[AdapterRecord] = [default] if wanted.config.lora else []
        held: dict[str, list[Reservation]] = {}
        try:
            if isinstance(found, ServerError):
                raise found
            if found is not None:
                require_same_lora(wanted.run, found[0].config.lora, wanted.run, wanted.config.lora)
                records = found[0].adapters
            for record in records:
                held[record.name] = self._reserve(model, wanted, record)
        except ServerError as error:
            _release(held)
            self._end_opening(opening, error)
            return
        work = NewAdaptersWork(self._engine, model, wanted.run, wanted.config, records, found)

        def made(outcome: Outcome | ServerError) -> None:
            if isinstance(outcome, ServerError):
                _release(held)
                self._end_opening(opening, outcome)
                return
            for name, adapter in work.adapters.items():
                adapter.held += held[name]
            training = partial(self._training_bytes, model, wanted.config)
            run = _new_run(wanted, work.adapters, training, self._dispatch.now, found)
            self.by_name[run.name] = run
            self._end_opening(opening, run)

        self._dispatch.submit(Job(work, wanted.run, 0, made))

    def _end_opening(self, opening: _Opening, result: Run | ServerError) -> None:
        opening.reading.release()
        del self._openings[opening.wanted.run]
        if isinstance(result, ServerError):
            self._budget.quotas.forget(opening.wanted.run)
        for done in opening.waiting:
            done(result)

    def _reserve(self, model: BaseModel, wanted: Wanted, record: AdapterRecord) -> list[Reservation]:
        """Raises OutOfCapacity; nothing is reserved then."""
        sizes = {Kind.ADAPTERS: sum(layer_bytes(model, lora) for lora in record.lora)}
        if record.trainable:
            sizes |= training_sizes(self._training_bytes(model, wanted.config, record.lora))
        return reserve_all(self.reclaim.reserve, sizes, wanted.run, record.name)

    def _training_bytes(self, model: BaseModel, config: RunConfig, lora: Sequence[LayerLora]) -> TrainingBytes:
        return TrainingBytes.of(model, lora, config.moment_dtype, config.world_size, self._engine.threads)

    def take_rank(self, run: Run, wanted: Wanted) -> tuple[Member, bool]:
        """The member that holds the rank from now on, and whether it was there before. Raises StreamReplaced for a stale epoch,
        AlreadyExists for a rank that another trainer holds."""
        if not 0 <= wanted.rank < run.config.world_size:
            raise InvalidRequest(f"rank {wanted.rank} is outside [0, {run.config.world_size}) of run {run.name!r}")
        existing = run.members.get(wanted.rank)
        if existing is not None and existing.instance == wanted.instance:
            if wanted.epoch <= existing.epoch:
                raise StreamReplaced(f"epoch {wanted.epoch} of {existing} is stale, it is at {existing.epoch}")
            if wanted.born == existing.born:
                return existing, True
            self._require_accepting(run)
            # Made by a join whose answer was lost: the trainer has never sent it anything, and must hear that it is new.
            self.end_stream(existing, StreamReplaced(f"{existing} joined again"))
            self._remove_from_run(existing)
            existing = None
        if existing is not None:
            self._require_free(existing, wanted, self._dispatch.now)
            self._require_accepting(run)
            self.end_stream(existing, WrongPhase(f"{existing} was taken over by another trainer"))
            self._remove_from_run(existing)
            self._saving.acknowledged(run)
        self._require_accepting(run)
        while len(self.members) >= self._limits.max_members:
            if not self.reclaim.one():
                full = OutOfCapacity(f"{len(self.members)} members are joined, the limit is {self._limits.max_members}")
                raise self.reclaim.with_retry(full, run.name)
        return self._new_member(run, wanted), False

    @staticmethod
    def _require_free(existing: Member, wanted: Wanted, now: float) -> None:
        if wanted.takeover or existing.lease.is_over(now):
            return
        left = existing.lease.left_s(now)
        if left is None:
            raise AlreadyExists(
                f"{existing} is held by another trainer that is connected; end that one, choose another run name, or join "
                "with takeover=True"
            )
        raise AlreadyExists(
            f"{existing} is held by a trainer that lost its connection; its lease ends in {left:.0f} s. Wait, or join with "
            "takeover=True",
            retry_delay_s=max(left, 0.1),
        )

    def _new_member(self, run: Run, wanted: Wanted) -> Member:
        limits = self._limits
        is_known = any(mark.instance == wanted.instance for mark in run.marks.values())
        if not is_known and all(each.stream is None for each in run.members.values()):
            run.writes.clear()  # they were counted by trainers that are gone
        member = Member(
            run,
            wanted.rank,
            wanted.instance,
            Lease(limits.lease_s, limits.retention_s),
            Credits(limits.credit_requests, limits.credit_bytes),
            ReplayLog(0),
            Tickets(self._dispatch.retired),
            Windows(),
            wanted.epoch,
        )
        member.durable = _of_instance(run.durable_marks.get(wanted.rank), wanted.instance)
        member.included = _of_instance(run.marks.get(wanted.rank), wanted.instance)
        run.members[wanted.rank] = member
        run.empty_since = None
        return member

    def end_stream(self, member: Member, error: ServerError | None) -> None:
        stream, member.stream = member.stream, None
        if stream is not None:
            self._dispatch.emit(EndStream(stream, error))

    def remove(self, member: Member) -> None:
        """Frees what the member holds; the run goes on, unless it was ephemeral and this was its last member."""
        if member.is_gone:
            return
        self._remove_from_run(member)
        run = member.run
        if not run.members:
            run.empty_since = self._dispatch.now
            if run.ephemeral:
                self.close(run)
                return
        self._saving.acknowledged(run)

    def _remove_from_run(self, member: Member) -> None:
        member.is_gone = True
        self.end_stream(member, WrongPhase(f"{member} is no longer joined"))
        self.requests.forget(member)
        member.tickets.drop_all("released when its member left")
        member.run.members.pop(member.rank, None)
        self._budget.drop_kept()  # for those who stay it is one fresh ticket

    def close(self, run: Run) -> None:
        """Members are told that the run was closed; its memory is free when the engine has let go of it."""
        if run.is_closed:
            return
        run.is_closed = True
        if self.by_name.get(run.name) is run:
            del self.by_name[run.name]
        gone = NotFound(f"run {run.name!r} was closed")
        self.requests.break_barrier(run, gone, list(run.barrier.waiting))
        for member in list(run.members.values()):
            self.end_stream(member, gone)
            self.remove(member)
        for adapter in run.adapters.values():
            adapter.release()
        self._budget.quotas.forget(run.name)
        self._saving.forget(run)
        self._dispatch.forget_run(run.name)

    def acknowledged(self, run: Run) -> None:
        """A member has acknowledged outcomes."""
        self._saving.acknowledged(run)

    def tick(self) -> None:
        """Leases that are over, members that did not come back, runs nobody uses."""
        now = self._dispatch.now
        for member in self.members:
            if member.lease.may_be_reclaimed(now):
                self._dispatch.note(f"{member} did not come back: it is given up")
                self.remove(member)
            elif member.lease.is_over(now) and not member.lapse_was_told:
                member.lapse_was_told = True
                self._dispatch.note(f"{member} lost its lease")
                self.requests.break_barrier(member.run, vanished(member), member.run.barrier.impatient())
        for run in list(self.by_name.values()):
            self.requests.end_late_waits(run)
            if run.empty_since is not None and not run.members and now >= run.empty_since + self._patience(run):
                self._dispatch.note(f"run {run.name!r} had no members for {self._patience(run):g} s: it is closed")
                self._close_for_good(run)

    def _close_for_good(self, run: Run) -> None:
        """Not before its last state is on disk, where there is a disk."""
        if not run.changed_since_snapshot or not self._saving.has_store or run.ephemeral:
            self.close(run)
            return
        run.empty_since = self._dispatch.now - self._patience(run) + _CLOSE_AGAIN_S

        def saved() -> None:
            if not run.changed_since_snapshot and not run.members:
                self.close(run)

        self._saving.take(run, saved)

    def _patience(self, run: Run) -> float:
        """Seconds a run may be without members. An ephemeral one that nobody joined gets the length of a lease."""
        return self._limits.lease_s if run.ephemeral else self._limits.run_ttl_s

    def next_deadline(self) -> float | None:
        times: list[float | None] = []
        for run in self.by_name.values():
            times.append(run.barrier.next_deadline())
            if not run.members and run.empty_since is not None:
                times.append(run.empty_since + self._patience(run))
            for member in run.members.values():
                times.append(member.lease.reclaimed_at if member.lapse_was_told else member.lease.ends)
        return min((each for each in times if each is not None), default=None)


def _release(held: dict[str, list[Reservation]]) -> None:
    for reservations in held.values():
        for each in reservations:
            each.release()


def _new_run(
    wanted: Wanted, adapters: dict[str, Adapter], training: Callable[[Sequence[LayerLora]], TrainingBytes], now: float,
    restored: Restored,
) -> Run:  # fmt: skip
    run = Run(
        wanted.run, wanted.config, wanted.ephemeral, wanted.identity, wanted.instance, now, adapters, training,
        Barrier(wanted.config.world_size), empty_since=now, snapshot_at=now,
    )  # fmt: skip
    if restored is not None:
        manifest = restored[0]
        run.step, run.writes, run.snapshots = manifest.step, dict(manifest.writes), manifest.sequence
        run.marks = {int(rank): mark for rank, mark in manifest.members.items()}
        run.durable_marks = dict(run.marks)
        run.opened_by = ""  # it is not new to anybody
    return run


def _of_instance(mark: MemberMark | None, instance: str) -> int:
    """The request that a mark names, where it is that instance's; else 0."""
    return mark.request_id if mark is not None and mark.instance == instance else 0
