"""Carries out the requests of members: in order within a member, each once."""

from __future__ import annotations

from collections.abc import Callable

import kt_expert_native as native
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.lora import DEFAULT_ADAPTER
from kt_expert_proto.status import STATUS_NUMBERS
from kt_expert_proto.v1.session_pb2 import ErrorDetail, ResultHead, TensorName, Timing

from kt_expert_server.adapters.window import Windows
from kt_expert_server.checkpoints.manifest import MemberMark
from kt_expert_server.engine.adapter_work import CreateAdapterWork, DeleteAdapterWork, EditWork, Owner
from kt_expert_server.engine.backward import BackwardWork
from kt_expert_server.engine.passes import ForwardWork, PassWork, Tools
from kt_expert_server.engine.step import Collective, NormWork, StepWork
from kt_expert_server.engine.transfers import ListWork, ReadWork, WriteWork
from kt_expert_server.engine.work import PASSES, Outcome, Work
from kt_expert_server.errors import BarrierBroken, DeadlinePassed, RequestCancelled, ServerError, WrongPhase
from kt_expert_server.members import wire
from kt_expert_server.members.actions import Send
from kt_expert_server.members.barrier import Arrival
from kt_expert_server.members.dispatch import Dispatch
from kt_expert_server.members.replay_log import Entry, Phase
from kt_expert_server.members.run import Member, Run
from kt_expert_server.members.saving import Saving
from kt_expert_server.members.scheduler import Job
from kt_expert_server.model.loader import BaseModel

_MAX_ERROR_TEXT = 4096
_MS_PER_S = 1000
_WRITES = (Op.WRITE_TENSOR, Op.CREATE_ADAPTER, Op.DELETE_ADAPTER)


class Requests:
    """Takes whole requests from the exchanges and gives their outcomes back to them."""

    def __init__(self, tools: Tools, dispatch: Dispatch, saving: Saving) -> None:
        self._tools = tools
        self._dispatch = dispatch
        self._saving = saving
        self._jobs: dict[Entry, Job] = {}  # of requests that wait for the engine or run

    def advance(self, member: Member, model: BaseModel) -> None:
        """Goes on with the member's next request, as far as that can be done at once."""
        while not member.is_gone:
            entry = member.log.head()
            if entry is None or entry.phase is not Phase.QUEUED or entry in self._jobs:
                return
            if entry.refusal is None and self._dispatch.now >= entry.deadline:
                entry.refusal = DeadlinePassed("the request's deadline passed before its turn came; nothing was done")
            if entry.refusal is not None:
                self.settle(member, entry, Outcome(error=entry.refusal))
                continue
            self._begin(member, entry, model)

    def cancel(self, member: Member, entry: Entry) -> None:
        """The outcome is no longer wanted. What was begun and cannot be stopped ends as it would have."""
        cancelled = RequestCancelled("the request was cancelled before it ran; nothing was done")
        match entry.phase:
            case Phase.QUEUED:
                job = self._jobs.get(entry)
                if job is not None:
                    self._dispatch.withdraw(job)
                    del self._jobs[entry]
                entry.refusal = cancelled
            case Phase.AT_BARRIER:
                member.run.barrier.withdraw(member.rank)
                self.settle(member, entry, Outcome(error=cancelled))
            case Phase.RUNNING:
                job = self._jobs.get(entry)
                if job is not None and job.work.token is not None:
                    job.work.token.cancel()
            case Phase.DONE:
                pass

    def forget(self, member: Member) -> None:
        """The member is gone: nothing of its requests is to be done any more, and nothing they hold is needed."""
        member.lose_fast()
        for entry in member.log.clear():
            job = self._jobs.get(entry)
            if entry.phase is Phase.RUNNING:
                if job is not None and job.work.token is not None:
                    job.work.token.cancel()
                if job is not None:
                    continue  # its tensors are read until the work ends
            elif job is not None:
                self._dispatch.withdraw(job)
                del self._jobs[entry]
            entry.drop_tensors()
            entry.drop_outcome()
        member.run.barrier.withdraw(member.rank)

    def settle(self, member: Member, entry: Entry, outcome: Outcome) -> None:
        """The request has its outcome: kept until acknowledged, and sent if there is a stream."""
        entry.drop_tensors()
        if outcome.error is not None:
            entry.outcome_held.release()
        if outcome.head is not None:
            outcome.head.durable, outcome.head.step = member.durable, member.run.step
        member.log.settle(entry, outcome)
        self.send_outcome(member, entry)

    def send_outcome(self, member: Member, entry: Entry) -> None:
        outcome = entry.outcome
        if member.stream is None or outcome is None:
            return
        kind = FrameType.RESULT if outcome.error is None else FrameType.ERROR
        header = Header(kind, entry.request_id, entry.header.layer, entry.header.op, epoch=member.epoch)
        if outcome.error is not None:
            self._dispatch.emit(Send(member.stream, header, error_detail(outcome.error).SerializeToString()))
            return
        assert outcome.head is not None  # noqa: S101
        self._dispatch.emit(Send(member.stream, header, outcome.head.SerializeToString()))
        for about, buffer in outcome.tensors:
            header = Header(
                about.type, entry.request_id, about.layer, about.op, about.tensor, about.dtype, about.rows, about.columns,
                epoch=member.epoch,
            )  # fmt: skip
            self._dispatch.emit(Send(member.stream, header, buffer))

    def answer_probe(self, member: Member, request_id: int) -> None:
        """An acknowledgement came again: its trainer waits for an outcome, and asks whether anything was lost on its way. The
        numbers of the two messages tell."""
        if member.stream is not None:
            self._dispatch.emit(Send(member.stream, Header(FrameType.ACK, request_id, epoch=member.epoch), b""))

    def _begin(self, member: Member, entry: Entry, model: BaseModel) -> None:
        run, opened = member.run, entry.opened
        match entry.header.op:
            case Op.GRAD_NORM | Op.STEP:
                self._arrive(member, entry)
            case Op.ZERO_GRAD:
                member.windows.close(opened.zero_grad.adapter)
                self.settle(member, entry, Outcome(ResultHead()))
            case Op.SET_STEP:
                self._set_step(member, entry)
            case Op.SAVE_CHECKPOINT:
                entry.phase = Phase.RUNNING
                author = MemberMark(member.instance, entry.request_id)
                self._saving.save(run, opened.save_checkpoint.name, author, self._settles(member, entry))
            case Op.LOAD_CHECKPOINT:
                entry.phase = Phase.RUNNING
                loader = MemberMark(member.instance, entry.request_id)
                self._saving.load(run, opened.load_checkpoint.name, loader, self._settles(member, entry))
            case Op.LEAVE:
                self.settle(member, entry, Outcome(ResultHead()))
                member.is_leaving = True  # gone once it has acknowledged all outcomes, or its stream ends
            case _:
                self._run_work(member, entry, self._work(member, entry, model))

    def _set_step(self, member: Member, entry: Entry) -> None:
        run, waiting = member.run, member.run.barrier.stepping()
        if run.is_stepping or waiting:
            who = f"ranks {waiting} wait for" if waiting else "all ranks have met for"
            error = WrongPhase(f"{who} step {run.step + 1} of run {run.name!r}; set the step before any rank asks for one")
            self.settle(member, entry, Outcome(error=error))
            return
        run.step = entry.opened.set_step.step
        run.written_since_step = run.changed_since_snapshot = True
        self.settle(member, entry, Outcome(ResultHead()))

    def _settles(self, member: Member, entry: Entry) -> Callable[[Outcome | ServerError], None]:
        def done(outcome: Outcome | ServerError) -> None:
            if member.is_gone:
                self._drop(member, entry, outcome)
            else:
                self.settle(member, entry, outcome if isinstance(outcome, Outcome) else Outcome(error=outcome))

        return done

    @staticmethod
    def _drop(member: Member, entry: Entry, outcome: Outcome | ServerError) -> None:
        """The member went while its request ran."""
        entry.drop_tensors()
        entry.drop_outcome()
        if isinstance(outcome, Outcome):
            outcome.release()
        member.tickets.drop_all("released when its member left")

    def _work(self, member: Member, entry: Entry, model: BaseModel) -> Work:
        header, opened = entry.header, entry.opened
        match header.op:
            case Op.FORWARD:
                token = native.CancelToken(entry.deadline - self._dispatch.now)
                forward, layer = opened.forward, model.layers[header.layer]
                return ForwardWork(
                    self._tools, member.trained, layer, header, entry.tensors, top_k=forward.top_k,
                    save=forward.save_for_backward, adapters=wire.active_adapters(forward),
                    dropout_seed=forward.dropout_seed, token=token,
                )  # fmt: skip
            case Op.BACKWARD:
                token = native.CancelToken(entry.deadline - self._dispatch.now)
                backward, layer = opened.backward, model.layers[header.layer]
                return BackwardWork(
                    self._tools, member.trained, layer, header, entry.tensors[Tensor.GRAD_OUTPUT], ticket=backward.ticket,
                    keep_ticket=backward.keep_ticket, targets=wire.targets(backward),
                    top_k=backward.top_k or layer.plan.top_k, token=token,
                )  # fmt: skip
            case Op.CREATE_ADAPTER | Op.DELETE_ADAPTER:
                return self._adapter_work(member, entry, model)
        return self._tensor_work(member, entry, model)

    def _adapter_work(self, member: Member, entry: Entry, model: BaseModel) -> Work:
        run = member.run

        def windows() -> list[Windows]:
            return list(run.windows().values())

        if entry.header.op is Op.DELETE_ADAPTER:
            return DeleteAdapterWork(run.adapters, entry.opened.delete_adapter.adapter, windows)
        owner = Owner(run.name, model, self._tools.engine, run.adapters, run.config.moment_dtype, run.training)
        wanted = wire.adapter_request(entry.opened.create_adapter, run.config.seed, member.instance)
        return CreateAdapterWork(self._tools.budget.reserve, owner, wanted, windows)

    def _tensor_work(self, member: Member, entry: Entry, model: BaseModel) -> Work:
        header, opened, run = entry.header, entry.opened, member.run
        match header.op:
            case Op.LIST_TENSORS:
                asked = opened.list_tensors
                about = ResultHead(writes=run.writes.get(asked.adapter, 0), old_adapters=run.old_adapters())
                return ListWork(run.adapters, about, asked.adapter, parameters=asked.parameters, moments=asked.moments)
            case Op.READ_TENSOR:
                size = sum(each.size_bytes for each in entry.outcome_held)
                tensor = wire.tensor_id(header.layer, opened.read_tensor)
                return ReadWork(self._tools.pool, member.trained, model, tensor, size)
            case Op.EDIT_GRADIENTS:
                return EditWork(self._tools, member.trained, wire.edits(opened.edit_gradients))
        assert header.op is Op.WRITE_TENSOR, header.op  # noqa: S101
        tensor, values = wire.tensor_id(header.layer, opened.write_tensor), entry.tensors[Tensor.ADAPTER]
        return WriteWork(self._tools, member.trained, tensor, values, header, opened.write_tensor.step)

    def _run_work(self, member: Member, entry: Entry, work: Work) -> None:
        run, settle, queued_at = member.run, self._settles(member, entry), self._dispatch.now

        begun_at = queued_at

        def begun() -> None:
            nonlocal begun_at
            entry.phase, begun_at = Phase.RUNNING, self._dispatch.now
            if work.kind in PASSES:
                self._tools.observer.stage(work.kind, "queue", self._dispatch.now - queued_at)

        def done(outcome: Outcome | ServerError) -> None:
            self._jobs.pop(entry, None)
            if entry.header.op in _WRITES and isinstance(outcome, Outcome):
                run.written_since_step = run.changed_since_snapshot = True
                _count_write(run, entry.opened.write_tensor)
            if entry.opened.timed and isinstance(work, PassWork) and isinstance(outcome, Outcome) and outcome.head is not None:
                outcome.head.timing.CopyFrom(_timing(entry, work, begun_at, self._dispatch.now))
            settle(outcome)

        job = Job(work, run.name, member.rank, done, begun)
        self._jobs[entry] = job
        self._dispatch.submit(job)

    def _arrive(self, member: Member, entry: Entry) -> None:
        run, params, index = member.run, None, member.run.step
        if entry.header.op is Op.STEP:
            params, index = wire.step_params(entry.opened.step), entry.opened.step.step
            if index == run.step > 0:  # asked again, as after a time-out of the caller
                self.settle(member, entry, Outcome(ResultHead()))
                return
            if index != run.step + 1:
                self.settle(member, entry, Outcome(error=WrongPhase(
                    f"step {index} was asked for, the next is {run.step + 1}; a member has missed or repeated one"
                )))  # fmt: skip
                return
        if run.loading:
            error = WrongPhase(f"checkpoint {run.loading!r} is being loaded into the run; ask again afterwards")
            self.settle(member, entry, Outcome(error=error))
            return
        entry.phase = Phase.AT_BARRIER
        is_step = entry.header.op is Op.STEP
        patient = entry.opened.step.patient if is_step else entry.opened.grad_norm.patient
        text = f"step {index}" if is_step else "grad_norm"
        run.barrier.arrive(member.rank, Arrival(entry, entry.header.op, text, params, patient))
        lapsed = [each for each in run.members.values() if each is not member and each.lease.is_over(self._dispatch.now)]
        if lapsed and not patient:
            self.break_barrier(run, vanished(lapsed[0]), [member.rank])
            return
        arrivals = run.barrier.complete()
        if arrivals is not None:
            self._meet(run, arrivals)

    def break_barrier(self, run: Run, error: ServerError, ranks: list[int]) -> None:
        """Those ranks get the error; nothing was applied, and the same may be asked for again."""
        for rank in ranks:
            arrival = run.barrier.withdraw(rank)
            if arrival is not None:
                self.settle(run.members[rank], arrival.entry, Outcome(error=error))

    def end_late_waits(self, run: Run) -> None:
        for rank, error in run.barrier.late(self._dispatch.now).items():
            arrival = run.barrier.withdraw(rank)
            if arrival is not None:
                self.settle(run.members[rank], arrival.entry, Outcome(error=error))

    def _meet(self, run: Run, arrivals: dict[int, Arrival]) -> None:
        """All members are there: what they came for is done once."""
        members = {rank: run.members[rank] for rank in arrivals}
        first = next(iter(arrivals.values()))
        together = Collective(run.adapters, run.windows(), run.config.world_size)
        work: Work
        if first.op is Op.STEP:
            params = {rank: each.params for rank, each in arrivals.items() if each.params is not None}
            run.is_stepping = True
            work = StepWork(self._tools.engine, together, params)
        else:
            asked = first.entry.opened.grad_norm
            work = NormWork(self._tools.engine, together, wire.tensor_sets(asked.sets), wire.norm_order(asked))

        def done(outcome: Outcome | ServerError) -> None:
            run.is_stepping = run.is_stepping and first.op is not Op.STEP
            if isinstance(outcome, Outcome) and first.op is Op.STEP:
                self._stepped(run, members, arrivals)
            for rank, arrival in arrivals.items():
                error = outcome if isinstance(outcome, ServerError) else None
                head = ResultHead() if error is not None or outcome.head is None else outcome.head  # type: ignore[union-attr]
                copy = ResultHead()
                copy.CopyFrom(head)
                self._settles(members[rank], arrival.entry)(error or Outcome(copy))

        for arrival in arrivals.values():
            arrival.entry.phase = Phase.RUNNING
        self._dispatch.submit(Job(work, run.name, min(arrivals), done))

    def _stepped(self, run: Run, members: dict[int, Member], arrivals: dict[int, Arrival]) -> None:
        run.step += 1
        for arrival in arrivals.values():
            assert arrival.entry.opened.step.step == run.step, f"{arrival.text} was applied as step {run.step}"  # noqa: S101
        # What a member goes on adding to is not in a snapshot: a server that began from it would lack that.
        run.written_since_step = not all(member.windows.is_empty for member in members.values())
        run.changed_since_snapshot = True
        for rank, member in members.items():
            run.marks[rank] = MemberMark(member.instance, arrivals[rank].entry.request_id)
        self._saving.after_step(run)


def _count_write(run: Run, name: TensorName) -> None:
    if name.sequence:
        adapter = name.adapter or DEFAULT_ADAPTER
        run.writes[adapter] = max(run.writes.get(adapter, 0), name.sequence)


def vanished(member: Member) -> BarrierBroken:
    return BarrierBroken(
        f"{member} has vanished: it had no connection for the length of its lease. Nothing was applied; once it has joined "
        "again, ask for the same step again"
    )


def error_detail(error: ServerError) -> ErrorDetail:
    return ErrorDetail(
        code=STATUS_NUMBERS[error.code],
        message=str(error)[:_MAX_ERROR_TEXT],
        retry_delay_ms=round(error.retry_delay_s * _MS_PER_S),
    )


def _timing(entry: Entry, work: PassWork, begun: float, ended: float) -> Timing:
    return Timing(
        received=entry.received_at, complete=entry.complete_at, begun=begun, ended=ended, compute_s=work.spent_s,
        together=work.together, stages_s=work.stages_s,
    )  # fmt: skip
