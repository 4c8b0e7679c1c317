"""Faults planted into the product, one at a time. The simulator must catch each within its budget of seeds."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import kt_expert_proto.codec as codec_module
import kt_expert_proto.header as header_module
from kt_expert_client.session.calls import Call
from kt_expert_client.session.core import SessionCore
from kt_expert_client.session.journal import Journal
from kt_expert_proto.codec import Decoder
from kt_expert_proto.header import FrameType, Op
from kt_expert_server.adapters.adapter import Adapter, AdapterLayer
from kt_expert_server.adapters.window import GradientWindow
from kt_expert_server.checkpoints import work as checkpoint_work
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.engine.tickets import Tickets
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

from simulation.engine_canaries import ENGINE_CANARIES
from simulation.planting import Canary, nothing, patched


def _credits_twice(original: Any) -> Any:
    def acknowledge(self: Exchange, up_to: int) -> None:
        for entry in [each for each in self.member.log if each.request_id <= up_to and each.credit_bytes is not None]:
            self.member.credits.give_back(entry.credit_bytes)
        original(self, up_to)

    return acknowledge


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

    patched(ServerCore, "_answer_join", joined)(stack)
    patched(Exchange, "_request", request)(stack)


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


CANARIES = (
    Canary("a lost acknowledgement gives its credits back twice", patched(Exchange, "_acknowledge", _credits_twice)),
    Canary("a checkpoint is renamed without fsync", patched(CheckpointStore, "publish", _published_unsynced), 3000),
    Canary("a checkpoint's files are written without fsync", patched(CheckpointStore, "_write_durably", _written_unsynced)),
    Canary("a stale epoch is accepted", patched(Runs, "take_rank", _any_epoch), 3000),
    Canary("a repeated request runs again", _plant_runs_twice),
    Canary("outcomes go with their stream", patched(ServerCore, "stream_closed", _outcomes_forgotten)),
    Canary("a half-received request counts as received", patched(Exchange, "close", _half_received_counts)),
    Canary("tickets go with their stream", patched(ServerCore, "stream_closed", _tickets_dropped)),
    Canary("a checkpoint is published before all have acknowledged", nothing(saving, "_is_acknowledged", True), 6000),
    Canary("a checkpoint says it holds less than it does", patched(Requests, "_stepped", _older_mark)),
    Canary("a checkpoint lacks the moments", patched(checkpoint_work, "copy_tensors", _without_moments)),
    Canary("a checkpoint names the next step", patched(saving, "SnapshotAbout", _step_off_by_one)),
    Canary("an outcome is acknowledged before it is complete", patched(SessionCore, "_result", _acknowledged_early)),
    Canary("the journal forgets forwards that were consumed", patched(Journal, "settled", _consumed_forwards_forgotten)),
    Canary("the journal takes every step for durable", patched(Journal, "durable", _everything_durable)),
    Canary("a trainer does not notice that its state is gone", nothing(Journal, "lost", result=False)),
    Canary("a step waits for all ranks but one", patched(Barrier, "complete", _quorum)),
    Canary("a member goes with its stream", patched(ServerCore, "stream_closed", _member_goes_with_its_stream)),
    Canary("checksums are not compared", nothing(header_module, "_check")),
    Canary("a piece received in its place is not checked", nothing(codec_module, "check_piece"), 3000),
    Canary("a request's tensors are never given back", patched(Entry, "drop_tensors", _request_tensors_kept)),
    Canary("a ticket's memory stays reserved", patched(Tickets, "drop", _tickets_reserved_for_ever)),
    Canary("the newest checkpoints are removed", patched(saving.Saving, "_prune", _oldest_kept)),
    Canary("what failed or was cancelled is committed", patched(Dispatch, "work_done", _commits_failures)),
    Canary("the oldest checkpoint is restored", patched(saving.Saving, "find_restart_point", _oldest_restored)),
    Canary("a join whose answer was lost is taken for known", patched(Runs, "take_rank", _birth_ignored), 3000),
    Canary("a trainer joins again under the same epoch", patched(SessionCore, "_connect", _same_epoch)),
    Canary("a trainer does not name its tickets", patched(SessionCore, "_connect", _tickets_not_named)),
    Canary("outcomes are not sent again", patched(Exchange, "resume", _outcomes_not_sent_again)),
    Canary("a half-received tensor is never given back", patched(Decoder, "close", _partial_kept)),
    Canary("a stream that has ended is still counted", patched(ServerCore, "take_actions", _streams_pile_up)),
    Canary("a window does not close", nothing(GradientWindow, "close")),
    Canary("a tensor is let go of while it is sent again", patched(Journal, "_drop", _let_go_while_repeated), 3000),
    Canary("what waited is not sent again after a restart", patched(SessionCore, "_begin_afresh", _unlogged_forward)),
    Canary("the journal forgets tensors that were written", patched(Journal, "settled", _written_forgotten), 3000),
    Canary("a repeated forward drops other values", patched(Call, "frames", _other_masks)),
    Canary("a checkpoint waits for what a restart has settled", patched(Member, "acknowledged", _only_its_own), 3000),
    Canary("a run that goes back keeps its step count", patched(saving, "_loaded", _step_kept)),
    Canary("a read tensor is not the adapter's", nothing(ReadWork, "run")),
    Canary("an adapter's memory stays reserved", nothing(Adapter, "release")),
    Canary("a copy of an adapter begins at zero", nothing(AdapterLayer, "copy_parameters")),
    Canary("a checkpoint is loaded without its moments", patched(saving, "ApplyWork", _moments_not_loaded)),
    *ENGINE_CANARIES,
)  # fmt: skip
