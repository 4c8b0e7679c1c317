"""Faults planted into the product, one at a time. The simulator must catch each within its budget of seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import kt_expert_native as native
import kt_expert_proto.header as header_module
from kt_expert_client.session.calls import Call
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.journal import Journal
from kt_expert_proto.codec import Decoder
from kt_expert_proto.header import FrameType, Op
from kt_expert_proto.shared import Allocator
from kt_expert_server.adapters.adapter import Adapter, AdapterLayer
from kt_expert_server.adapters.window import GradientWindow
from kt_expert_server.checkpoints import work as checkpoint_work
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.edge.same_host.memory import SharedTensors
from kt_expert_server.engine.backward import BackwardWork
from kt_expert_server.engine.passes import ForwardWork
from kt_expert_server.engine.tickets import Tickets
from kt_expert_server.engine.together import SharedPass
from kt_expert_server.engine.transfers import ReadWork
from kt_expert_server.members import saving
from kt_expert_server.members.barrier import Barrier
from kt_expert_server.members.core import ServerCore
from kt_expert_server.members.dispatch import Dispatch
from kt_expert_server.members.exchange import Exchange
from kt_expert_server.members.replay_log import Entry
from kt_expert_server.members.requests import Requests
from kt_expert_server.members.run import Member
from kt_expert_server.members.runs import Runs

Plant = Callable[[ExitStack], None]


@dataclass(frozen=True)
class Canary:
    name: str
    plant: Plant
    budget: int = 600  # seeds it may take to be caught


def _patched(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Plant:
    """`wrap` gets the original and gives what stands in its place."""

    def plant(stack: ExitStack) -> None:
        stack.enter_context(patch.object(owner, name, wrap(getattr(owner, name))))

    return plant


def _nothing(owner: Any, name: str, result: object = None) -> Plant:
    return _patched(owner, name, lambda _: lambda *_args, **_kwargs: result)


def _credits_twice(original: Any) -> Any:
    def acknowledge(self: Exchange, up_to: int) -> None:
        for entry in [each for each in self.member.log if each.request_id <= up_to and each.credit_bytes is not None]:
            self.member.credits.give_back(entry.credit_bytes)
        original(self, up_to)

    return acknowledge


def _window_closed_early(original: Any) -> Any:
    def prepare(self: BackwardWork) -> None:
        original(self)
        for target in self._targets:
            window = self._trained.windows.of(target.adapter)
            window._there[self._header.layer] = window.there(self._header.layer) & ~target.replaced
            window._open[self._header.layer] = window.open(self._header.layer) & ~target.replaced

    return prepare


def _published_unsynced(_: Any) -> Any:
    def publish(self: CheckpointStore, name: str) -> None:
        self._disk.rename(("checkpoints", ".partial-" + name), ("checkpoints", name))

    return publish


def _written_unsynced(_: Any) -> Any:
    return lambda self, content, *path: self._disk.write_file(content, *path)


def _any_epoch(original: Any) -> Any:
    def take_rank(self: Runs, run: Any, wanted: Any) -> Any:
        existing = run.members.get(wanted.rank)
        if existing is not None and existing.instance == wanted.instance:
            return existing, True
        return original(self, run, wanted)

    return take_rank


def _plant_runs_twice(stack: ExitStack) -> None:
    """The server says it has less than it has, and takes what comes again for new."""

    def joined(original: Any) -> Any:
        def answer(self: ServerCore, state: Any, member: Any, join: Any, *, resumed: bool) -> None:
            received, member.log.received = member.log.received, member.log.acknowledged
            original(self, state, member, join, resumed=resumed)
            member.log.received = received

        return answer

    def request(original: Any) -> Any:
        def take(self: Exchange, header: Any, payload: bytes) -> None:
            log = self.member.log
            if header.request_id <= log.received and header.op is Op.BACKWARD and log.find(header.request_id) is not None:
                log.received = header.request_id - 1
            original(self, header, payload)

        return take

    _patched(ServerCore, "_answer_join", joined)(stack)
    _patched(Exchange, "_request", request)(stack)


def _outcomes_forgotten(original: Any) -> Any:
    def closed(self: ServerCore, stream: int, now: float) -> None:
        state = self._streams.get(stream)
        if state is not None and state.exchange is not None:
            for entry in [each for each in state.exchange.member.log if each.outcome is not None]:
                entry.outcome.release()
                entry.outcome.tensors = []
        original(self, stream, now)

    return closed


def _half_received_counts(original: Any) -> Any:
    def close(self: Exchange) -> None:
        if self._arriving is not None:
            self.member.log.received = max(self.member.log.received, self._arriving.entry.request_id)
        original(self)

    return close


def _tickets_dropped(original: Any) -> Any:
    def closed(self: ServerCore, stream: int, now: float) -> None:
        state = self._streams.get(stream)
        if state is not None and state.exchange is not None:
            state.exchange.member.tickets.drop_all("the stream was cut")
        original(self, stream, now)

    return closed


def _older_mark(original: Any) -> Any:
    def stepped(self: Requests, run: Any, members: Any, arrivals: Any) -> None:
        before = dict(run.marks)
        original(self, run, members, arrivals)
        run.marks = before

    return stepped


def _without_moments(original: Any) -> Any:
    return lambda adapters: [entry for entry in original(adapters) if entry[0].part == "parameter"]


def _step_off_by_one(original: Any) -> Any:
    return lambda *args: original(*args[:4], args[4] + 1, *args[5:])


def _acknowledged_early(original: Any) -> Any:
    def result(self: SessionCore, header: Any, head: Any, now: float) -> None:
        original(self, header, head, now)
        if header.request_id > self._acknowledged:
            self._acknowledged = header.request_id
            self._control(FrameType.ACK, header.request_id)
            self._acknowledged -= 1

    return result


def _consumed_forwards_forgotten(original: Any) -> Any:
    def settled(self: Journal, call: Call) -> None:
        original(self, call)
        if call.ticket:
            self._drop([call.ticket])

    return settled


def _everything_durable(original: Any) -> Any:
    return lambda self, through: original(self, self._anchor)


def _quorum(original: Any) -> Any:
    def complete(self: Barrier) -> Any:
        if len(self._arrivals) == self._world_size - 1 and self._world_size > 1:
            return {rank: self._arrivals.pop(rank) for rank in sorted(self._arrivals)}
        return original(self)

    return complete


def _member_goes_with_its_stream(original: Any) -> Any:
    def closed(self: ServerCore, stream: int, now: float) -> None:
        state = self._streams.get(stream)
        original(self, stream, now)
        if state is not None and state.exchange is not None and not state.exchange.member.is_gone:
            self.runs.remove(state.exchange.member)

    return closed


def _request_tensors_kept(_: Any) -> Any:
    def drop(self: Entry) -> None:
        self.held.release()

    return drop


def _tickets_reserved_for_ever(_: Any) -> Any:
    def drop(self: Tickets, ticket_id: int, how: str) -> None:
        if self._saved.pop(ticket_id, None) is not None:
            self._consumed[ticket_id] = how

    return drop


def _oldest_kept(_: Any) -> Any:
    def prune(self: saving.Saving, store: CheckpointStore, run: str) -> None:
        def job() -> None:
            for name in [name for name, manifest in store.of_run(run) if manifest.automatic][self._limits.keep_checkpoints :]:
                store.remove(name)

        self._dispatch.on_disk(job, lambda _: None)

    return prune


def _commits_failures(_: Any) -> Any:
    def done(self: Dispatch, error: Exception | None, fault: str) -> None:
        del error, fault
        running, self._running = self._running, None
        assert running is not None
        for job in running.jobs:
            self._end(job, job.work.commit())

    return done


def _oldest_restored(_: Any) -> Any:
    def find(self: saving.Saving, run: str, owner: str, held: Any, done: Any) -> None:
        del owner, held
        store = self._store

        def oldest() -> Any:
            found = [name for name, manifest in store.of_run(run) if manifest.restart_point]
            return store.read(found[0]) if found else None

        self._dispatch.on_disk(oldest, done)

    return find


def _birth_ignored(original: Any) -> Any:
    def take_rank(self: Runs, run: Any, wanted: Any) -> Any:
        existing = run.members.get(wanted.rank)
        if existing is not None and existing.instance == wanted.instance:
            wanted = replace(wanted, born=existing.born)
        return original(self, run, wanted)

    return take_rank


def _same_epoch(original: Any) -> Any:
    def connect(self: SessionCore) -> None:
        self._epoch = 0
        original(self)

    return connect


def _tickets_not_named(original: Any) -> Any:
    def connect(self: SessionCore) -> None:
        tickets, self._journal.tickets = self._journal.tickets, set()
        calls, self._in_flight.calls = self._in_flight.calls, {}
        original(self)
        self._journal.tickets, self._in_flight.calls = tickets, calls

    return connect


def _outcomes_not_sent_again(_: Any) -> Any:
    def resume(self: Exchange, acknowledged: int, tickets: list[int]) -> None:
        self._acknowledge(acknowledged)
        self.member.tickets.keep_only(set(tickets), acknowledged, "released")

    return resume


def _partial_kept(_: Any) -> Any:
    def close(self: Decoder[Any]) -> None:
        self._partial = None

    return close


def _gradients_pile_up(original: Any) -> Any:
    def into(self: BackwardWork, used: Any, target: Any) -> Any:
        return replace(original(self, used, target), replaced=[])

    return into


def _cancelled_half_way(_: Any) -> Any:
    def token(self: BackwardWork, part: int) -> Any:
        del part
        return self.token

    return token


def _last_part_left_out(original: Any) -> Any:
    def run(self: ForwardWork, part: int) -> None:
        if not part or part + 1 < self.parts:
            original(self, part)

    return run


def _unlogged_forward(original: Any) -> Any:
    """Requests that were waiting are not sent again after the server began anew."""

    def afresh(self: SessionCore, joined: Any, now: float) -> bool:
        went_on = original(self, joined, now)
        unsent = self._in_flight.unsent
        if went_on and len(unsent) > 1 and not unsent[-1].is_replay:
            unsent.pop()
        return bool(went_on)

    return afresh


def _let_go_while_repeated(_: Any) -> Any:
    def drop(self: Journal, request_ids: Any) -> None:
        for request_id in request_ids:
            call = self._entries.pop(request_id, None)
            self._consumers.pop(request_id, None)
            if call is not None:
                self._size_bytes -= call.size_bytes
                call.on_unneeded(call)

    return drop


def _streams_pile_up(_: Any) -> Any:
    return lambda self: self.dispatch.take_actions()


def _written_forgotten(original: Any) -> Any:
    def settled(self: Journal, call: Call) -> None:
        original(self, call)
        if call.op is Op.WRITE_TENSOR:
            self._drop([call.request_id])

    return settled


def _other_masks(original: Any) -> Any:
    def frames(self: Call, deadline_ms: int, epoch: int) -> Any:
        if self.is_replay and self.op is Op.FORWARD and self.opened.forward.dropout_seed:
            self.opened.forward.dropout_seed += 1
        return original(self, deadline_ms, epoch)

    return frames


def _only_its_own(_: Any) -> Any:
    return property(lambda self: self.log.acknowledged)


def _moments_not_loaded(original: Any) -> Any:
    def apply(adapters: Any, run: str, manifest: Any, tensors: Any) -> Any:
        return original(adapters, run, manifest, [entry for entry in tensors if entry[0].part == "parameter"])

    return apply


def _step_kept(original: Any) -> Any:
    def loaded(run: Any, manifest: Any, loader: Any) -> None:
        step = run.step
        original(run, manifest, loader)
        run.step = step

    return loaded


def _tickets_mixed_up(original: Any) -> Any:
    return lambda self, pieces: list(reversed(original(self, pieces)))


def _computed_twice(original: Any) -> Any:
    """What was computed together is computed alone once more."""

    def compute(self: SharedPass, pieces: Any) -> Any:
        original(self, pieces)
        if len(pieces) > 1:
            raise native.InvalidArgument("planted")
        return [None] * len(pieces)

    return compute


def _first_one_s_error(original: Any) -> Any:
    """One piece's failure is everybody's."""

    def run(self: SharedPass, part: int) -> None:
        original(self, part)
        for error in list(self.errors.values())[:1]:
            self.errors = dict.fromkeys(self.pieces, error)

    return run


def _used_while_read(original: Any) -> Any:
    """A place serves again although its reader has not given it back."""

    def reuse(self: Allocator, offset: int) -> None:
        if not self._used[offset].is_owned:
            self._used[offset].generation = 0
        original(self, offset)

    return reuse


def _plant_given_back_early(stack: ExitStack) -> None:
    """A tensor's place goes back to the trainer before the server has computed from it."""

    def show(original: Any) -> Any:
        def shown(self: SharedTensors, header: Any, place: Any, offer: Any) -> Any:
            taken = original(self, header, place, offer)
            self._on_free(place)
            return taken

        return shown

    _patched(SharedTensors, "show", show)(stack)
    _patched(SharedTensors, "_returned", lambda _: lambda self, place: self._borrower.release(place))(stack)


def _lent_wherever_it_lies(_: Any) -> Any:
    """An outcome of an older connection is shown at its place there."""

    def lend(self: SharedTensors, buffer: Any) -> Any:
        if not hasattr(buffer, "offset"):
            return None
        used = self._allocator._used.get(buffer.offset)
        if used is None:
            self._allocator.take(len(buffer.view))
        return self._allocator.lend(buffer.offset) if buffer.offset in self._allocator._used else None

    return lend


CANARIES = (
    Canary("a lost acknowledgement gives its credits back twice", _patched(Exchange, "_acknowledge", _credits_twice)),
    Canary("a backward closes the window before it can fail", _patched(BackwardWork, "prepare", _window_closed_early)),
    Canary("a checkpoint is renamed without fsync", _patched(CheckpointStore, "publish", _published_unsynced), 3000),
    Canary("a checkpoint's files are written without fsync", _patched(CheckpointStore, "_write_durably", _written_unsynced)),
    Canary("a stale epoch is accepted", _patched(Runs, "take_rank", _any_epoch), 3000),
    Canary("a repeated request runs again", _plant_runs_twice),
    Canary("outcomes go with their stream", _patched(ServerCore, "stream_closed", _outcomes_forgotten)),
    Canary("a half-received request counts as received", _patched(Exchange, "close", _half_received_counts)),
    Canary("tickets go with their stream", _patched(ServerCore, "stream_closed", _tickets_dropped)),
    Canary("a checkpoint is published before all have acknowledged", _nothing(saving, "_is_acknowledged", True), 6000),
    Canary("a checkpoint says it holds less than it does", _patched(Requests, "_stepped", _older_mark)),
    Canary("a checkpoint lacks the moments", _patched(checkpoint_work, "copy_tensors", _without_moments)),
    Canary("a checkpoint names the next step", _patched(saving, "SnapshotAbout", _step_off_by_one)),
    Canary("an outcome is acknowledged before it is complete", _patched(SessionCore, "_result", _acknowledged_early)),
    Canary("the journal forgets forwards that were consumed", _patched(Journal, "settled", _consumed_forwards_forgotten)),
    Canary("the journal takes every step for durable", _patched(Journal, "durable", _everything_durable)),
    Canary("a trainer does not notice that its state is gone", _nothing(Journal, "lost", result=False)),
    Canary("a step waits for all ranks but one", _patched(Barrier, "complete", _quorum)),
    Canary("a member goes with its stream", _patched(ServerCore, "stream_closed", _member_goes_with_its_stream)),
    Canary("checksums are not compared", _nothing(header_module, "_check")),
    Canary("a request's tensors are never given back", _patched(Entry, "drop_tensors", _request_tensors_kept)),
    Canary("a ticket's memory stays reserved", _patched(Tickets, "drop", _tickets_reserved_for_ever)),
    Canary("the newest checkpoints are removed", _patched(saving.Saving, "_prune", _oldest_kept)),
    Canary("what failed or was cancelled is committed", _patched(Dispatch, "work_done", _commits_failures)),
    Canary("the oldest checkpoint is restored", _patched(saving.Saving, "find_restart_point", _oldest_restored)),
    Canary("a join whose answer was lost is taken for known", _patched(Runs, "take_rank", _birth_ignored), 3000),
    Canary("a trainer joins again under the same epoch", _patched(SessionCore, "_connect", _same_epoch)),
    Canary("a trainer does not name its tickets", _patched(SessionCore, "_connect", _tickets_not_named)),
    Canary("outcomes are not sent again", _patched(Exchange, "resume", _outcomes_not_sent_again)),
    Canary("a half-received tensor is never given back", _patched(Decoder, "close", _partial_kept)),
    Canary("a stream that has ended is still counted", _patched(ServerCore, "take_actions", _streams_pile_up)),
    Canary("a window does not close", _nothing(GradientWindow, "close")),
    Canary("gradients of an older window are added to", _patched(BackwardWork, "_gradients_of", _gradients_pile_up)),
    Canary("a backward is cancelled between its parts", _patched(BackwardWork, "token_of", _cancelled_half_way)),
    Canary("batches computed together get one another's tickets", _patched(SharedPass, "_compute", _tickets_mixed_up)),
    Canary("what was computed together counts twice", _patched(SharedPass, "_compute", _computed_twice)),
    Canary("one batch's failure is its company's", _patched(SharedPass, "run_part", _first_one_s_error), 3000),
    Canary("a place in shared memory serves again while it is read", _patched(Allocator, "_reuse", _used_while_read)),
    Canary("a place in shared memory goes back too early", _plant_given_back_early),
    Canary("an outcome is shown in another connection's memory", _patched(SharedTensors, "lend", _lent_wherever_it_lies)),
    Canary("a part of a pass is left out", _patched(ForwardWork, "run_part", _last_part_left_out)),
    Canary("a tensor is let go of while it is sent again", _patched(Journal, "_drop", _let_go_while_repeated), 3000),
    Canary("what waited is not sent again after a restart", _patched(SessionCore, "_begin_afresh", _unlogged_forward)),
    Canary("the journal forgets tensors that were written", _patched(Journal, "settled", _written_forgotten), 3000),
    Canary("a repeated forward drops other values", _patched(Call, "frames", _other_masks)),
    Canary("a checkpoint waits for what a restart has settled", _patched(Member, "acknowledged", _only_its_own), 3000),
    Canary("a run that goes back keeps its step count", _patched(saving, "_loaded", _step_kept)),
    Canary("a read tensor is not the adapter's", _nothing(ReadWork, "run")),
    Canary("an adapter's memory stays reserved", _nothing(Adapter, "release")),
    Canary("a copy of an adapter begins at zero", _nothing(AdapterLayer, "copy_parameters")),
    Canary("a checkpoint is loaded without its moments", _patched(saving, "ApplyWork", _moments_not_loaded)),
)  # fmt: skip


@contextmanager
def planted(canary: Canary) -> Iterator[None]:
    with ExitStack() as stack:
        canary.plant(stack)
        yield
