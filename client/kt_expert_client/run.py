"""A member of a run: asynchronous forward and backward, barriers, and the run's adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from kt_expert_proto.codec import Buffer
from kt_expert_proto.dtypes import ITEM_BYTES, TOKEN_DTYPES, Dtype
from kt_expert_proto.header import Op, Tensor
from kt_expert_proto.lora import DEFAULT_ADAPTER, GRADIENT, PARAMETER, PART_NAMES, STEP, tensor_bits
from kt_expert_proto.v1 import service_pb2
from kt_expert_proto.v1 import session_pb2 as pb

from kt_expert_client.adapter import ActiveAdapter, AdapterTensors, GradientTarget, LayerLora, TensorKey, TensorSet
from kt_expert_client.adapters import RunAdapters
from kt_expert_client.asking import Asking
from kt_expert_client.errors import InvalidRequest
from kt_expert_client.fast_forward import FastForward, FastForwards
from kt_expert_client.optimizers import ParamGroup, Update, step_groups
from kt_expert_client.profile.recorder import Recorder
from kt_expert_client.profile.times import Stamps
from kt_expert_client.session.actions import JoinTerms
from kt_expert_client.session.calls import Call, OutTensor
from kt_expert_client.session.driver import Pending, Session
from kt_expert_client.staging import Delivery, HostBuffer, HostTensor, Staging

DEFAULT_REQUEST_TIMEOUT_S = 600.0
DEFAULT_BARRIER_TIMEOUT_S = 1800.0  # ranks may differ by a whole gradient accumulation
_TRANSFER_TIMEOUT_S = 3600.0
_SEEDS = 1 << 64


class ForwardHandle:
    """A forward in flight."""

    def __init__(
        self, asked: Pending | FastForward, output: Delivery, recorder: Recorder, like_it: FastForwards | None = None
    ) -> None:  # fmt: skip
        """`like_it` hears by which number the like of it may be asked for."""
        self._fast = asked if isinstance(asked, FastForward) else None
        self._pending = None if isinstance(asked, FastForward) else asked
        self._output, self._recorder, self._like_it = output, recorder, like_it
        self._result: torch.Tensor | None = None  # of a fast one

    @property
    def pending(self) -> Pending:
        """The request as the session has it. One that was not the session's becomes so."""
        if self._pending is None:
            assert self._fast is not None  # noqa: S101
            self._pending, self._fast = self._fast.ordinary(), None
        return self._pending

    @property
    def ticket(self) -> int:
        """Names its saved state for the backward. It may change until result() has returned: a forward for which the server
        had no memory is asked for again, under another id, unless something was submitted after it."""
        return self.pending.request_id

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        """The output [T, H] on the device and in the dtype of the hidden states. Raises the request's error."""
        if self._result is None and self._pending is None and self._fast is not None:
            self._result = self._fast.result()
        if self._result is not None:
            return self._result
        wanted = time.monotonic()
        self.pending.wait(timeout_s)
        output = self._output.tensor(_received(self.pending, Tensor.OUTPUT))
        self._recorder.end(self.pending.call, wanted)
        if self._like_it is not None and self.pending.call.head is not None:
            self._like_it.learn(self.pending.call.head.fast_entry)
        return output

    def abandon(self, session: Session) -> None:
        """Nobody will ask for its result."""
        if self._pending is not None:
            session.abandon(self._pending)
        elif self._fast is not None and self._result is None:
            self._fast.drop()


class BackwardHandle:
    """A backward in flight."""

    def __init__(self, pending: Pending, grad_hidden: Delivery, grad_weights: Delivery, recorder: Recorder) -> None:
        self.pending = pending
        self._recorder = recorder
        self._grad_hidden = grad_hidden
        self._grad_weights = grad_weights

    def result(self, timeout_s: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden states [T, H] and of routing weights fp32 [T, k]. Raises the request's error."""
        wanted = time.monotonic()
        self.pending.wait(timeout_s)
        hidden = self._grad_hidden.tensor(_received(self.pending, Tensor.GRAD_HIDDEN_STATES))
        weights = self._grad_weights.tensor(_received(self.pending, Tensor.GRAD_ROUTING_WEIGHTS))
        self._recorder.end(self.pending.call, wanted)
        return hidden, weights


def _received(pending: Pending, tensor: Tensor) -> HostBuffer:
    return cast("HostBuffer", pending.results[tensor])


class Run:
    """One joined rank of a run. Any thread may submit."""

    def __init__(
        self,
        session: Session,
        staging: Staging,
        terms: JoinTerms,
        wire_dtype: str,
        top_k: dict[int, int],
        on_leave: Callable[[Run], None],
        recorder: Recorder,
    ) -> None:
        joined = session.core.joined
        assert joined is not None  # noqa: S101  # the session has started
        self.name = terms.run
        self.wire_dtype = wire_dtype
        self.world_size = terms.config.world_size
        self.created = joined.created  # by this call: no other trainer has had this run before
        self._session = session
        self._wire = TOKEN_DTYPES[wire_dtype]
        self._step = int(joined.step)
        self._top_k = top_k
        lora = [LayerLora.from_proto(entry) for entry in terms.config.lora]
        self._dropout = {entry.layer: entry.dropout for entry in lora}
        self._default = (ActiveAdapter(DEFAULT_ADAPTER),) if lora else ()
        self._default_bits = {entry.layer: tensor_bits(entry.tensors) for entry in lora}
        self._on_leave = on_leave
        self._recorder = recorder
        self._staging = staging
        self._asking = Asking(session, self.name, self.world_size)
        self.adapters = RunAdapters(session, self._asking)
        self._closed = False

    @property
    def steps_taken(self) -> int:
        """Optimizer steps of the run, as far as this member knows."""
        return self._step

    def submit_forward(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        save_for_backward: bool = True,
        adapters: Iterable[ActiveAdapter] | None = None,
        dropout_seed: int | None = None,
        timeout_s: float = DEFAULT_REQUEST_TIMEOUT_S,
        borrow: bool = False,
    ) -> ForwardHandle:
        """Sends one layer's batch and returns at once.

        hidden_states [T, H], any float dtype (sent in the run's wire dtype); expert_ids [T, k] integer, E itself skips a
        route; routing_weights [T, k], sent as fp32. Tensors on CPU or CUDA; they are copied, and may be changed as soon as
        this returns, unless `borrow` says that they stay as they are until result() returns. `adapters` are added to the
        base weights: by default the one the run began with, if it did; () for the base model alone. dropout_seed, a number
        below 2**64, drops LoRA inputs with the adapter's probability, the same ones for a seed; 0 drops none; without one,
        a forward that saves for a backward draws one from torch's generator where the adapter has a dropout. Raises
        InvalidRequest for shapes that do not fit together, OutOfCapacity or DeadlineExceeded where no credits are free;
        everything else comes with result().
        """
        stamps = self._recorder.begin(self._step)
        tokens, hidden = _check_forward(hidden_states, expert_ids, routing_weights)
        seed = self._dropout_seed(layer, dropout_seed, save_for_backward)
        borrow = borrow and not self._session.keeps_requests
        sent = (
            self._out(Tensor.EXPERT_IDS, Dtype.INT32, expert_ids, borrow=borrow),
            self._out(Tensor.ROUTING_WEIGHTS, Dtype.FP32, routing_weights, borrow=borrow),
            self._out(Tensor.HIDDEN_STATES, self._wire, hidden_states, borrow=borrow),
        )
        active = self._default if adapters is None else tuple(adapters)
        output = Delivery(self._staging, self._wire, (tokens, hidden), hidden_states.device, hidden_states.dtype)
        size, pinned = tokens * hidden * ITEM_BYTES[self._wire], hidden_states.is_cuda

        def ask() -> Pending:
            forward = pb.Forward(
                top_k=expert_ids.shape[1],
                save_for_backward=save_for_backward,
                adapters=[each.to_proto() for each in active],
                dropout_seed=seed,
            )
            opened = pb.RequestOpen(forward=forward, timed=stamps is not None)
            call = self._pass(Op.FORWARD, layer, tokens, hidden, opened, sent, timeout_s, stamps)
            call.expects, call.pinned = {Tensor.OUTPUT: size}, pinned
            return self._session.submit(call)

        if save_for_backward or seed or stamps is not None:
            return ForwardHandle(ask(), output, self._recorder)
        like_it = FastForwards(self._session, (layer, expert_ids.shape[1], active))
        begun = like_it.begin(sent)
        if begun is None:
            return ForwardHandle(ask(), output, self._recorder, like_it)
        return ForwardHandle(FastForward(begun, sent, output, ask), output, self._recorder, like_it)

    def submit_backward(
        self,
        layer: int,
        ticket: int,
        grad_output: torch.Tensor,
        *,
        targets: Iterable[GradientTarget] | None = None,
        replace_gradients: bool = False,
        keep_ticket: bool = False,
        top_k: int = 0,
        timeout_s: float = DEFAULT_REQUEST_TIMEOUT_S,
        borrow: bool = False,
    ) -> BackwardHandle:
        """Sends the gradient [T, H] of a forward's output and returns at once.

        LoRA gradients stay on the server, added to this member's. `targets` says which: by default all of the adapter the run
        began with, which replace_gradients makes forget what they held in this layer. The ticket is consumed unless
        keep_ticket says that another backward comes, or release(). `top_k` is that of the forward, where it is not the
        config's. `borrow` and errors as for submit_forward.
        """
        if grad_output.dim() != 2 or layer not in self._top_k:
            raise InvalidRequest(f"grad_output has shape {tuple(grad_output.shape)} for layer {layer}, expected [T, H]")
        stamps = self._recorder.begin(self._step)
        tokens, hidden = (int(extent) for extent in grad_output.shape)
        borrow = borrow and not self._session.keeps_requests
        sent = (self._out(Tensor.GRAD_OUTPUT, self._wire, grad_output, borrow=borrow),)
        if targets is None:
            bits = self._default_bits.get(layer, 0)
            targets = [GradientTarget(DEFAULT_ADAPTER, bits, bits if replace_gradients else 0)] if bits else []
        top_k = top_k or self._top_k[layer]
        backward = pb.Backward(
            ticket=ticket, keep_ticket=keep_ticket, targets=[each.to_proto() for each in targets], top_k=top_k
        )
        opened = pb.RequestOpen(backward=backward, timed=stamps is not None)
        call = self._pass(Op.BACKWARD, layer, tokens, hidden, opened, sent, timeout_s, stamps)
        routes = (tokens, top_k)
        call.expects = {
            Tensor.GRAD_HIDDEN_STATES: tokens * hidden * ITEM_BYTES[self._wire],
            Tensor.GRAD_ROUTING_WEIGHTS: math.prod(routes) * ITEM_BYTES[Dtype.FP32],
        }
        call.pinned = grad_output.is_cuda
        device = grad_output.device
        return BackwardHandle(
            self._session.submit(call),
            Delivery(self._staging, self._wire, (tokens, hidden), device, grad_output.dtype),
            Delivery(self._staging, Dtype.FP32, routes, device, torch.float32),
            self._recorder,
        )

    def release(self, ticket: int) -> None:
        """Frees a ticket that no backward will consume. Never waits and never fails."""
        if not self._closed:
            self._session.release(ticket)

    def abandon(self, forward: ForwardHandle) -> None:
        """Nobody will ask for its result. Never waits and never fails; what it kept is freed."""
        if not self._closed:
            forward.abandon(self._session)

    def grad_norm(self, timeout_s: float = DEFAULT_BARRIER_TIMEOUT_S, *, order: float = 2.0) -> float:
        """Barrier: norm of the gradients of the adapter the run began with, averaged over the world size."""
        sets = [service_pb2.TensorSet(adapter=DEFAULT_ADAPTER)] if self._default_bits else []
        asked = pb.RequestOpen(grad_norm=pb.GradNorm(sets=sets, order=order))
        return float(self._asking.ask(Op.GRAD_NORM, asked, timeout_s).norm)

    def step(
        self,
        update: Update | Sequence[ParamGroup],
        grad_scale: float = 1.0,
        timeout_s: float = DEFAULT_BARRIER_TIMEOUT_S,
        *,
        new_optimizer: bool = False,
    ) -> int:
        """Barrier: one optimizer update with the averaged gradients times grad_scale. What is added up afterwards begins anew.

        `update` goes for all tensors of the adapter the run began with; as a sequence of groups, each for its own. With
        `new_optimizer` the moments of an earlier one are forgotten first. Returns the steps taken.
        """
        groups = [ParamGroup(update)] if isinstance(update, Update) else update
        return self.take_step(step_groups(groups, grad_scale, new_optimizer=new_optimizer), timeout_s=timeout_s)

    def take_step(
        self,
        groups: Sequence[service_pb2.ParamGroup],
        kept: Sequence[TensorSet] = (),
        timeout_s: float = DEFAULT_BARRIER_TIMEOUT_S,
    ) -> int:
        """step() in the protocol's own words. Gradients that are `kept` go on being added to; all others end."""
        step = pb.Step(step=self._step + 1, groups=groups, kept=[each.to_proto() for each in kept])
        self._step = int(self._asking.ask(Op.STEP, pb.RequestOpen(step=step), timeout_s).step)
        return self._step

    def zero_grad(self, adapter: str = "") -> None:
        """Forgets what this member accumulated, for one adapter or for all."""
        self._asking.ask(Op.ZERO_GRAD, pb.RequestOpen(zero_grad=pb.ZeroGrad(adapter=adapter)), _TRANSFER_TIMEOUT_S)

    def get_adapter(self, *, parameters: bool = True, moments: bool = False, adapter: str = "") -> AdapterTensors:
        """fp32 tensors [E, rows, columns] of one adapter of the run, or of all."""
        asked = pb.RequestOpen(list_tensors=pb.ListTensors(adapter=adapter, parameters=parameters, moments=moments))
        infos = self._asking.ask(Op.LIST_TENSORS, asked, _TRANSFER_TIMEOUT_S).tensors
        keys = [TensorKey(info.layer, info.tensor, PART_NAMES[info.part], info.adapter) for info in infos]
        shapes = [(info.shape[0], info.shape[1], info.shape[2]) for info in infos]
        return {key: self.adapters.read(key, shape) for key, shape in zip(keys, shapes, strict=True)}

    def put_adapter(self, tensors: AdapterTensors, *, step: int | None = None) -> None:
        """Replaces tensors of the run. With moments, `step` is the run's step count from then on, and how many updates
        they stand for where no part "step" says otherwise.

        Tensor by tensor: where one is refused (InvalidRequest, NotFound), those before it have been replaced, that one and
        those after it have not; the step count then stays."""
        ordered = sorted(tensors.items(), key=lambda entry: entry[0].part == STEP)  # counts after what they count
        for key, tensor in ordered:
            self.adapters.write(key, tensor, step=step or 0)
        if any(key.part not in (PARAMETER, GRADIENT) for key in tensors):
            self.set_steps(step or 0)

    def set_steps(self, count: int) -> None:
        """From now on the run has taken so many optimizer steps. Raises WrongPhase where a rank waits for one."""
        opened = pb.RequestOpen(set_step=pb.SetStep(step=count))
        self._step = int(self._asking.ask(Op.SET_STEP, opened, _TRANSFER_TIMEOUT_S).step)

    def refresh_steps(self) -> None:
        """Learns the run's step count from the server: another member may have set it."""
        opened = pb.RequestOpen(list_tensors=pb.ListTensors())
        self._step = int(self._asking.ask(Op.LIST_TENSORS, opened, _TRANSFER_TIMEOUT_S).step)

    def save_checkpoint(self, name: str) -> str:
        """Snapshot of adapter, moments and step on the server's disk. Returns its digest."""
        opened = pb.RequestOpen(save_checkpoint=pb.CheckpointName(name=name))
        return self._asking.ask(Op.SAVE_CHECKPOINT, opened, _TRANSFER_TIMEOUT_S).digest

    def load_checkpoint(self, name: str) -> str:
        """Replaces adapter, moments and step of the run by a snapshot's. Returns the base model's digest."""
        opened = pb.RequestOpen(load_checkpoint=pb.CheckpointName(name=name))
        head = self._asking.ask(Op.LOAD_CHECKPOINT, opened, _TRANSFER_TIMEOUT_S)
        self._step = int(head.step)
        return head.digest

    def leave(self) -> None:
        """Gives the rank back; the server frees its tickets. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._on_leave(self)
        self._session.leave()

    def _pass(
        self, op: Op, layer: int, tokens: int, hidden: int, opened: pb.RequestOpen, sent: tuple[OutTensor, ...],
        timeout_s: float, stamps: Stamps | None,
    ) -> Call:  # fmt: skip
        return Call(op, opened, timeout_s, layer, self._wire, tokens, hidden, sent, on_unneeded=_release_sources, stamps=stamps)

    def _out(self, tensor: Tensor, dtype: Dtype, values: torch.Tensor, *, borrow: bool) -> OutTensor:
        rows, columns = (int(extent) for extent in values.shape)
        return OutTensor(tensor, dtype, rows, columns, self._staging.to_host(values, dtype, borrow=borrow))

    def _dropout_seed(self, layer: int, seed: int | None, save_for_backward: bool) -> int:
        if seed is not None:
            if not 0 <= seed < _SEEDS:
                raise InvalidRequest(f"dropout_seed is {seed}, expected a number from 0 to 2**64 - 1")
            return seed
        if not save_for_backward or not self._dropout.get(layer):
            return 0
        return int(torch.randint(1, 2**63 - 1, ()).item())


def memory_of(staging: Staging) -> Callable[[int, Call], Buffer]:
    """Where a session's results are received."""

    def take(size_bytes: int, call: Call) -> Buffer:
        return staging.buffer(size_bytes, pinned=call.pinned)

    return take


def _release_sources(call: Call) -> None:
    for each in call.tensors:
        cast("HostTensor", each.source).release()


def _check_forward(hidden_states: torch.Tensor, expert_ids: torch.Tensor, routing_weights: torch.Tensor) -> tuple[int, int]:
    fits = (
        hidden_states.dim() == 2
        and expert_ids.dim() == 2
        and expert_ids.shape == routing_weights.shape
        and expert_ids.shape[0] == hidden_states.shape[0]
        and hidden_states.is_floating_point()
        and not expert_ids.is_floating_point()
    )
    if not fits:
        raise InvalidRequest(
            f"got hidden_states {tuple(hidden_states.shape)} {hidden_states.dtype}, expert_ids {tuple(expert_ids.shape)} "
            f"{expert_ids.dtype}, routing_weights {tuple(routing_weights.shape)}; expected [T, H] float, [T, k] integer and "
            "[T, k]"
        )
    return int(hidden_states.shape[0]), int(hidden_states.shape[1])
