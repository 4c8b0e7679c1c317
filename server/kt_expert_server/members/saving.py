"""Checkpoints of runs: copied under one turn of the engine, written on the disk's thread, published when nobody needs an older
state any more.

A checkpoint after step N is of use to a restarted server only if no trainer still lacks an outcome from before N: it could not
be computed again from the newer state. So a checkpoint gets its name once all members have acknowledged what it includes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from kt_expert_proto.v1.session_pb2 import ResultHead

from kt_expert_server.adapters.run_config import require_same_lora
from kt_expert_server.checkpoints.manifest import AdapterRecord, Manifest, MemberMark
from kt_expert_server.checkpoints.names import automatic_name
from kt_expert_server.checkpoints.snapshot import Snapshot, SnapshotAbout, Tensors, snapshot_bytes
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.checkpoints.work import ApplyWork, CopyWork
from kt_expert_server.engine.budget import Holdings, MemoryBudget, Reservation
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.quotas import CHECKPOINTS
from kt_expert_server.engine.work import Outcome
from kt_expert_server.errors import AlreadyExists, InvalidRequest, NotFound, NotPermitted, ServerError, WrongPhase
from kt_expert_server.members.dispatch import Dispatch
from kt_expert_server.members.limits import Limits
from kt_expert_server.members.run import Run
from kt_expert_server.members.scheduler import Job
from kt_expert_server.names import check_name
from kt_expert_server.observe.observer import Observer

Done = Callable[[Outcome | ServerError], None]
Restored = tuple[Manifest, Tensors] | None


@dataclass(eq=False, slots=True)
class _Pending:
    """A checkpoint between its copy and its name."""

    run: Run
    about: SnapshotAbout
    copy: Reservation
    done: Done
    begun: float
    digest: str = ""


class Saving:
    """Used from the core's thread; the store is called on the disk's."""

    def __init__(
        self,
        dispatch: Dispatch,
        budget: MemoryBudget,
        store: CheckpointStore | None,
        limits: Limits,
        observer: Observer,
        model_digest: Callable[[], str],
    ) -> None:
        self._dispatch = dispatch
        self._store = store
        self._limits = limits
        self._observer = observer
        self._model_digest = model_digest
        self._unpublished: list[_Pending] = []  # written, and waiting for acknowledgements
        self._under_way: set[Run] = set()  # whose automatic checkpoint is not published yet
        self._writing: dict[str, str] = {}  # checkpoints that are not published yet -> their runs
        self._readers: list[tuple[str, Callable[[], None]]] = []  # wait until nothing of a run is being written
        self._quotas = budget.quotas
        self.reserve = budget.reserve  # set by the core to one that gives up what nobody holds any more

    @property
    def has_store(self) -> bool:
        return self._store is not None

    def save(self, run: Run, name: str, author: MemberMark, done: Done) -> None:
        """`done` gets the manifest's sha256 as the result's digest, or an error."""
        try:
            self._require_store()
            check_name("checkpoint", name)
            self._begin(run, name, author, done)
        except ServerError as error:
            done(error)

    def after_step(self, run: Run) -> None:
        """Takes an automatic checkpoint where it is time for one."""
        if run.is_closed:
            return
        limits = self._limits
        by_steps = limits.checkpoint_every_steps > 0 and run.step % limits.checkpoint_every_steps == 0
        by_time = limits.checkpoint_every_s > 0 and self._dispatch.now - run.snapshot_at >= limits.checkpoint_every_s
        if by_steps or by_time:
            self.take(run)

    def take(self, run: Run, then: Callable[[], None] = lambda: None) -> None:
        """An automatic checkpoint, unless the last one is still being written. `then` is called when it is durable."""
        if self._store is None or run in self._under_way:
            return
        self._under_way.add(run)
        name = automatic_name(run.name, run.snapshots + 1)

        def done(outcome: Outcome | ServerError) -> None:
            self._under_way.discard(run)
            if isinstance(outcome, ServerError):
                self._dispatch.note(f"no checkpoint of run {run.name!r} at step {run.step}: {outcome}", logging.ERROR)
            else:
                then()

        try:
            self._begin(run, name, None, done)
        except ServerError as error:
            done(error)

    def acknowledged(self, run: Run) -> None:
        """A member has acknowledged outcomes, or is gone."""
        for pending in [each for each in self._unpublished if each.run is run and _is_acknowledged(each)]:
            self._unpublished.remove(pending)
            self._publish(pending)

    def load(self, run: Run, name: str, loader: MemberMark, done: Done) -> None:
        """Replaces adapter, moments and step of a run of the same LoRA. The result's digest is the base model's."""
        try:
            store = self._require_store()
            check_name("checkpoint", name)
            if run.barrier.waiting or run.loading:
                raise WrongPhase(f"a step of run {run.name!r} is under way; wait for it, then load")
        except ServerError as error:
            done(error)
            return
        run.loading = name
        begun = self._dispatch.now

        def finished(outcome: Outcome | ServerError) -> None:
            run.loading = ""
            if isinstance(outcome, Outcome):
                self._observer.checkpoint("load", self._dispatch.now - begun)
            done(outcome)

        def read(manifest: object) -> None:
            if isinstance(manifest, ServerError):
                finished(manifest)
            else:
                self._read_and_apply(store, run, name, cast("Manifest", manifest), loader, finished)

        self._dispatch.on_disk(lambda: _manifest(store, name, run.owner), read)

    def find_restart_point(self, run: str, owner: str, held: Holdings, done: Callable[[Restored | ServerError], None]) -> None:
        """The newest state of that run on disk, if there is one. What is read is reserved in `held`."""
        store = self._store
        if store is None:
            done(None)
            return
        if run in self._writing.values():  # the last state of one that was closed a moment ago
            self._readers.append((run, lambda: self.find_restart_point(run, owner, held, done)))
            return

        def newest() -> tuple[str, Manifest] | None:
            return next((found for found in reversed(store.of_run(run)) if found[1].restart_point), None)

        def found(result: object) -> None:
            if result is None or isinstance(result, ServerError):
                done(result)
                return
            name, manifest = cast("tuple[str, Manifest]", result)
            try:
                self.require_usable(name, manifest, owner)
                held.add(self._reserve_reading(run, name, manifest))
            except ServerError as error:
                done(error)
                return
            self._dispatch.on_disk(lambda: store.read(name), lambda read: done(cast("Restored | ServerError", read)))

        self._dispatch.on_disk(newest, found)

    def _reserve_reading(self, run: str, name: str, manifest: Manifest) -> Reservation:
        """The file of the largest layer is in memory beside the tensors that were read from it. Raises OutOfCapacity."""
        return self.reserve(Kind.CHECKPOINTS, 2 * manifest.size_bytes, run, f"checkpoint {name!r}")

    def require_usable(self, name: str, manifest: Manifest, owner: str) -> None:
        """Raises InvalidRequest for a checkpoint of another base model, NotPermitted for one of another identity."""
        if manifest.owner != owner:
            raise NotPermitted(f"checkpoint {name!r} belongs to another identity")
        if manifest.model_digest != self._model_digest():
            raise InvalidRequest(
                f"checkpoint {name!r} belongs to another base model than the one this server has loaded: the experts' weights "
                "differ; start the server with the model it was made on, or choose another name for the run"
            )

    def forget(self, run: Run) -> None:
        """The run is closed; automatic checkpoints of an ephemeral one serve nobody any more."""
        for pending in [each for each in self._unpublished if each.run is run]:
            self._unpublished.remove(pending)
            self._publish(pending)
        store = self._store
        if store is None or not run.ephemeral or not run.snapshots:
            return

        def remove() -> None:
            for name, manifest in store.of_run(run.name):
                if manifest.automatic:
                    store.remove(name)

        self._dispatch.on_disk(remove, self._report("checkpoints of a run that has ended could not be removed"))

    def _require_store(self) -> CheckpointStore:
        if self._store is None:
            raise WrongPhase("this server has no place for checkpoints; start it with --state-dir DIR")
        return self._store

    def _begin(self, run: Run, name: str, author: MemberMark | None, done: Done) -> None:
        """Raises OutOfCapacity where there is no memory for the copy."""
        if name in self._writing:
            raise AlreadyExists(f"checkpoint {name!r} is being written, perhaps by another run; choose another name")
        copy = self.reserve(Kind.CHECKPOINTS, snapshot_bytes(run.adapters), run.name, f"checkpoint {name!r}")
        self._writing[name] = run.name
        work, begun_at = CopyWork(run.adapters), self._dispatch.now
        abouts: list[SnapshotAbout] = []

        def ended(outcome: Outcome | ServerError) -> None:
            del self._writing[name]
            if isinstance(outcome, ServerError):
                run.changed_since_snapshot = True  # for whoever saves it before the run goes
            done(outcome)
            ready = [each for each in self._readers if each[0] not in self._writing.values()]
            self._readers = [each for each in self._readers if each not in ready]
            for _, read in ready:
                read()

        def begun() -> None:
            run.snapshots += 1
            if run.is_quiescent:  # the state holds all that was done, and there is nothing beside it
                run.marks |= {rank: MemberMark(each.instance, each.last_settled) for rank, each in run.members.items()}
                run.written_since_step = False
            safe = not run.written_since_step
            run.snapshot_at = self._dispatch.now
            if safe:
                run.changed_since_snapshot = False
            abouts.append(SnapshotAbout(
                name, run.name, run.owner, self._model_digest(), run.step, dict(run.writes), run.snapshots,
                author is None, safe, {str(rank): mark for rank, mark in sorted(run.marks.items())}, author,
                run.config, _records(run),
            ))  # fmt: skip

        def copied(outcome: Outcome | ServerError) -> None:
            if isinstance(outcome, ServerError):
                copy.release()
                ended(outcome)
            else:
                self._write(_Pending(run, abouts[0], copy, ended, begun_at), work.tensors)

        self._dispatch.submit(Job(work, run.name, 0, copied, begun, is_urgent=True))

    def _write(self, pending: _Pending, tensors: Tensors) -> None:
        store, about = self._require_store(), pending.about

        def write() -> str:
            self._require_disk_quota(store, about, sum(values.nbytes for _, values in tensors))
            try:
                return store.write(Snapshot(about, tensors))
            except AlreadyExists:
                # Asked for again by the same request, whose outcome was lost with the server.
                if about.author is None or store.manifest(about.name).author != about.author:
                    raise
                return store.digest(about.name)

        def written(result: object) -> None:
            tensors.clear()
            pending.copy.release()
            if isinstance(result, ServerError):
                pending.done(result)
                return
            pending.digest = str(result)
            if pending.run.is_closed or _is_acknowledged(pending):
                self._publish(pending)
            else:
                self._unpublished.append(pending)

        self._dispatch.on_disk(write, written)

    def _require_disk_quota(self, store: CheckpointStore, about: SnapshotAbout, size_bytes: int) -> None:
        """Raises OverQuota. One of the same name is that of the same request, made before the server died."""
        if CHECKPOINTS in self._limits.quotas:
            used = sum(manifest.size_bytes for name, manifest in store.of_owner(about.owner) if name != about.name)
            self._quotas.require_disk(about.owner, used, size_bytes, f"checkpoint {about.name!r}")

    def _publish(self, pending: _Pending) -> None:
        store, about, run = self._require_store(), pending.about, pending.run

        def publish() -> None:
            # It is there already where the same request was repeated; any other's keeps its name, and this one fails.
            if about.author is None or about.name not in store.names() or store.manifest(about.name).author != about.author:
                store.publish(about.name)

        def published(result: object) -> None:
            if isinstance(result, ServerError):
                pending.done(result)
                return
            if about.restart_point:
                _note_durable(run, about)
            self._observer.checkpoint("save", self._dispatch.now - pending.begun)
            pending.done(Outcome(ResultHead(digest=pending.digest)))
            if about.automatic:
                self._prune(store, run.name)

        self._dispatch.on_disk(publish, published)

    def _prune(self, store: CheckpointStore, run: str) -> None:
        keep = max(1, self._limits.keep_checkpoints)

        def prune() -> None:
            automatic = [(name, manifest.restart_point) for name, manifest in store.of_run(run) if manifest.automatic]
            restart_points = [name for name, is_restart_point in automatic if is_restart_point]
            # Trainers count on the newest restart point, and newer states that are none do not take its place.
            kept = {name for name, _ in automatic[-keep:]} | set(restart_points[-keep:])
            for name, _ in automatic:
                if name not in kept:
                    store.remove(name)

        self._dispatch.on_disk(prune, self._report("old checkpoints could not be removed"))

    def _report(self, what: str) -> Callable[[object], None]:
        def done(result: object) -> None:
            if isinstance(result, ServerError):
                self._dispatch.note(f"{what}: {result}", logging.WARNING)

        return done

    def _read_and_apply(
        self, store: CheckpointStore, run: Run, name: str, manifest: Manifest, loader: MemberMark, done: Done
    ) -> None:
        try:
            self.require_usable(name, manifest, run.owner)
            _require_same_adapters(name, manifest, run)
            copy = self._reserve_reading(run.name, name, manifest)
        except ServerError as error:
            done(error)
            return

        def read(result: object) -> None:
            if isinstance(result, ServerError):
                copy.release()
                done(result)
                return
            work = ApplyWork(run.adapters, run.name, manifest, cast("Restored", result)[1])  # type: ignore[index]
            self._dispatch.submit(Job(work, run.name, 0, applied))

        def applied(outcome: Outcome | ServerError) -> None:
            copy.release()
            if isinstance(outcome, ServerError):
                done(outcome)
                return
            _loaded(run, manifest, loader)
            done(Outcome(ResultHead(digest=manifest.model_digest)))

        self._dispatch.on_disk(lambda: store.read(name), read)


def _manifest(store: CheckpointStore, name: str, owner: str) -> Manifest:
    """Raises NotFound with what there is, of that owner's."""
    try:
        return store.manifest(name)
    except NotFound as error:
        raise NotFound(f"{error}; there are: {', '.join(name for name, _ in store.of_owner(owner)) or 'none'}") from None


def _records(run: Run) -> tuple[AdapterRecord, ...]:
    return tuple(AdapterRecord(name, each.lora, each.is_trained, each.maker) for name, each in sorted(run.adapters.items()))


def _require_same_adapters(checkpoint: str, manifest: Manifest, run: Run) -> None:
    """Raises InvalidRequest where the run lacks an adapter of the checkpoint, or has it with other ranks."""
    for record in manifest.adapters:
        if record.name not in run.adapters:
            raise InvalidRequest(
                f"checkpoint {checkpoint!r} has an adapter {record.name!r}, run {run.name!r} has {sorted(run.adapters)}; make "
                "one of that name first"
            )
        require_same_lora(checkpoint, record.lora, run.name, run.adapters[record.name].lora)


def _loaded(run: Run, manifest: Manifest, loader: MemberMark) -> None:
    run.step = manifest.step
    run.written_since_step, run.changed_since_snapshot = False, True
    for rank, member in run.members.items():
        member.windows.close()
        is_loader = member.instance == loader.instance
        run.marks[rank] = MemberMark(member.instance, loader.request_id if is_loader else member.last_settled)


def _note_durable(run: Run, about: SnapshotAbout) -> None:
    run.durable_marks = {int(rank): mark for rank, mark in about.members.items()}
    for rank, mark in run.durable_marks.items():
        member = run.members.get(rank)
        if member is not None and member.instance == mark.instance:
            member.durable = max(member.durable, mark.request_id)


def _is_acknowledged(pending: _Pending) -> bool:
    """Whether no member lacks an outcome that could not be computed again from this checkpoint."""
    for rank, mark in pending.about.members.items():
        member = pending.run.members.get(int(rank))
        if member is not None and member.instance == mark.instance and member.acknowledged < mark.request_id:
            return False
    return True
