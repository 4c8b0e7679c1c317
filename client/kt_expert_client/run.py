"""A member of a run: asynchronous forward and backward, barriers, and the run's adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import torch
from kt_expert_proto.frame import MAX_PAYLOAD_BYTES, Dtype, FrameType, Header, Op, Tensor
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc
from kt_expert_proto.v1.session_pb2 import RequestOpen

from kt_expert_client.adapter import PART_NAMES, PARTS, AdapterTensors, TensorKey
from kt_expert_client.errors import InvalidRequest, from_rpc
from kt_expert_client.optimizers import ParamGroup, Update
from kt_expert_client.session import Pending, Session
from kt_expert_client.staging import WIRE_TORCH_DTYPES, Delivery, HostTensor, Staging, byte_view

DEFAULT_REQUEST_TIMEOUT_S = 600.0
DEFAULT_BARRIER_TIMEOUT_S = 1800.0  # ranks may differ by a whole gradient accumulation
_SEEDS = 1 << 64
_CALL_TIMEOUT_S = 3600.0
_LEAVE_TIMEOUT_S = 10.0
_ANSWER_SLACK_S = 10.0  # the server's own deadline has the better message, so its answer gets time to travel
_WIRE_FRAME_DTYPES = {"bf16": Dtype.BF16, "fp32": Dtype.FP32}


class ForwardHandle:
    """A forward in flight. `ticket` names its saved state for the backward."""

    def __init__(self, pending: Pending, output: Delivery) -> None:
        self.pending = pending
        self.ticket = pending.request_id
        self._output = output

    def result(self, timeout_s: float | None = None) -> torch.Tensor:
        """The output [T, H] on the device and in the dtype of the hidden states. Raises the request's error."""
        self.pending.wait(timeout_s)
        return self._output.tensor()


class BackwardHandle:
    """A backward in flight."""

    def __init__(self, pending: Pending, grad_hidden: Delivery, grad_weights: Delivery) -> None:
        self.pending = pending
        self._grad_hidden = grad_hidden
        self._grad_weights = grad_weights

    def result(self, timeout_s: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of hidden states [T, H] and of routing weights fp32 [T, k]. Raises the request's error."""
        self.pending.wait(timeout_s)
        return self._grad_hidden.tensor(), self._grad_weights.tensor()


class Run:
    """One joined rank of a run. Any thread may submit."""

    def __init__(
        self,
        stub: service_pb2_grpc.ExpertStub,
        session: Session,
        name: str,
        joined: pb.JoinRunResponse,
        wire_dtype: str,
        top_k: dict[int, int],
        on_leave: Callable[[Run], None],
    ) -> None:
        self.name = name
        self.wire_dtype = wire_dtype
        self._stub = stub
        self._session = session
        self._member = joined.member
        self._step = int(joined.step)
        self._norm_sequence = int(joined.norm_sequence)
        self._top_k = top_k
        self._on_leave = on_leave
        self._staging = Staging()
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
        use_adapter: bool = True,
        dropout_seed: int = 0,
        timeout_s: float = DEFAULT_REQUEST_TIMEOUT_S,
    ) -> ForwardHandle:
        """Sends one layer's batch and returns at once.

        hidden_states [T, H], any float dtype (sent in the run's wire dtype); expert_ids [T, k] integer, E itself skips a
        route; routing_weights [T, k], sent as fp32. Tensors on CPU or CUDA. dropout_seed, a number below 2**64, drops
        LoRA inputs with the adapter's probability, the same ones for the same seed; 0 drops none. Raises InvalidRequest
        for shapes that do not fit together, OutOfCapacity or DeadlineExceeded where no credits are free; everything else
        comes with result().
        """
        tokens, hidden = _check_forward(hidden_states, expert_ids, routing_weights)
        if not 0 <= dropout_seed < _SEEDS:
            raise InvalidRequest(f"dropout_seed is {dropout_seed}, expected a number from 0 to 2**64 - 1")
        wire = WIRE_TORCH_DTYPES[self.wire_dtype]
        header = self._header(Op.FORWARD, layer, tokens, hidden)
        sent = {
            Tensor.EXPERT_IDS: (Dtype.INT32, self._staging.to_host(expert_ids, torch.int32)),
            Tensor.ROUTING_WEIGHTS: (Dtype.FP32, self._staging.to_host(routing_weights, torch.float32)),
            Tensor.HIDDEN_STATES: (header.dtype, self._staging.to_host(hidden_states, wire)),
        }
        output = self._staging.host_buffer((tokens, hidden), wire, pinned=hidden_states.is_cuda)
        opened = RequestOpen(
            top_k=expert_ids.shape[1],
            save_for_backward=save_for_backward,
            use_adapter=use_adapter,
            dropout_seed=dropout_seed,
        )
        pending = self._session.submit(header, opened, sent, {Tensor.OUTPUT: output}, timeout_s, lambda: self._recycle(sent))
        return ForwardHandle(pending, Delivery(self._staging, output, hidden_states.device, hidden_states.dtype))

    def submit_backward(
        self,
        layer: int,
        ticket: int,
        grad_output: torch.Tensor,
        *,
        begin_window: bool = False,
        timeout_s: float = DEFAULT_REQUEST_TIMEOUT_S,
    ) -> BackwardHandle:
        """Sends the gradient [T, H] of a forward's output and returns at once.

        The ticket is consumed; LoRA gradients stay on the server, added to this member's window. begin_window forgets
        what the window held before. Raises as submit_forward does.
        """
        if grad_output.dim() != 2 or layer not in self._top_k:
            raise InvalidRequest(f"grad_output has shape {tuple(grad_output.shape)} for layer {layer}, expected [T, H]")
        tokens, hidden = grad_output.shape
        wire = WIRE_TORCH_DTYPES[self.wire_dtype]
        header = self._header(Op.BACKWARD, layer, tokens, hidden)
        sent = {Tensor.GRAD_OUTPUT: (header.dtype, self._staging.to_host(grad_output, wire))}
        pinned = grad_output.is_cuda
        grad_hidden = self._staging.host_buffer((tokens, hidden), wire, pinned=pinned)
        grad_weights = self._staging.host_buffer((tokens, self._top_k[layer]), torch.float32, pinned=pinned)
        pending = self._session.submit(
            header,
            RequestOpen(ticket=ticket, begin_window=begin_window),
            sent,
            {Tensor.GRAD_HIDDEN_STATES: grad_hidden, Tensor.GRAD_ROUTING_WEIGHTS: grad_weights},
            timeout_s,
            lambda: self._recycle(sent),
        )
        device = grad_output.device
        return BackwardHandle(
            pending,
            Delivery(self._staging, grad_hidden, device, grad_output.dtype),
            Delivery(self._staging, grad_weights, device, torch.float32),
        )

    def release(self, ticket: int) -> None:
        """Frees a ticket that no backward will consume. Never waits and never fails."""
        if not self._closed:
            self._session.release(ticket)

    def grad_norm(self, timeout_s: float = DEFAULT_BARRIER_TIMEOUT_S) -> float:
        """Barrier: L2 norm of all LoRA gradients on the server, averaged over the world size."""
        request = pb.GradNormRequest(
            member=self._member,
            after_request_id=self._session.last_request_id,
            sequence=self._norm_sequence + 1,
            timeout_s=timeout_s,
        )
        response = self._call("grad_norm", self._stub.GradNorm, request, timeout_s)
        self._norm_sequence += 1
        return float(response.norm)

    def step(
        self,
        update: Update | Sequence[ParamGroup],
        grad_scale: float = 1.0,
        timeout_s: float = DEFAULT_BARRIER_TIMEOUT_S,
        *,
        new_optimizer: bool = False,
    ) -> int:
        """Barrier: one optimizer update with the averaged gradients times grad_scale. Closes the gradient window.

        `update` goes for all tensors; as a sequence of groups, each for its own. With `new_optimizer` the moments of an
        earlier one are forgotten first. Returns the steps taken.
        """
        groups = [ParamGroup(update)] if isinstance(update, Update) else update
        request = pb.StepRequest(
            member=self._member,
            after_request_id=self._session.last_request_id,
            step=self._step + 1,
            grad_scale=grad_scale,
            groups=[group.update.group(group.tensors) for group in groups],
            timeout_s=timeout_s,
            new_optimizer=new_optimizer,
        )
        self._step = int(self._call("step", self._stub.Step, request, timeout_s).step)
        return self._step

    def zero_grad(self) -> None:
        """Forgets what this member accumulated since the last step."""
        request = pb.MemberRequest(member=self._member, after_request_id=self._session.last_request_id)
        self._call("zero_grad", self._stub.ZeroGrad, request, _CALL_TIMEOUT_S)

    def get_adapter(self, *, parameters: bool = True, moments: bool = False) -> AdapterTensors:
        """fp32 tensors [E, rows, columns] of the run, by layer, name and part."""
        request = pb.GetAdapterRequest(run=self.name, parameters=parameters, moments=moments)
        tensors: AdapterTensors = {}
        try:
            for chunk in self._stub.GetAdapter(request, timeout=_CALL_TIMEOUT_S):
                key = TensorKey(chunk.layer, chunk.tensor, PART_NAMES[chunk.part])
                if key not in tensors:
                    tensors[key] = torch.empty(tuple(chunk.shape), dtype=torch.float32)
                view = byte_view(tensors[key])
                view[chunk.offset : chunk.offset + len(chunk.data)] = chunk.data
        except grpc.RpcError as error:
            raise from_rpc(error, "get_adapter") from error
        return tensors

    def put_adapter(self, tensors: AdapterTensors, *, step: int | None = None) -> None:
        """Replaces tensors of the run. With moments, `step` is the run's step count from then on, and how many updates
        they stand for where no part "step" says otherwise.

        Tensor by tensor: where one is refused (InvalidRequest, NotFound) or the call breaks off, those before it have been
        replaced, that one and those after it have not; the step count then stays."""
        if not tensors:
            return
        try:
            self._stub.PutAdapter(self._chunks(tensors, step or 0), timeout=_CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise from_rpc(error, "put_adapter") from error
        if any(key.part != "parameter" for key in tensors):
            self._step = step or 0

    def refresh_steps(self) -> None:
        """Learns the run's step count from the server: another member may have set it."""
        status = self._call("get_status", self._stub.GetStatus, pb.GetStatusRequest(), _CALL_TIMEOUT_S)
        self._step = next((int(run.step) for run in status.runs if run.run == self.name), self._step)

    def save_checkpoint(self, name: str) -> str:
        """Snapshot of adapter, moments and step on the server's disk. Returns its digest."""
        return self._checkpoint("save_checkpoint", self._stub.SaveCheckpoint, name)

    def load_checkpoint(self, name: str) -> str:
        """Replaces adapter, moments and step of the run by a snapshot's. Returns the base model's digest."""
        digest = self._checkpoint("load_checkpoint", self._stub.LoadCheckpoint, name)
        self.refresh_steps()
        return digest

    def leave(self) -> None:
        """Gives the rank back; the server frees its tickets. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._on_leave(self)
        with contextlib.suppress(grpc.RpcError):  # the server is gone, or the lease ran out: the rank is free either way
            self._stub.LeaveRun(pb.MemberRequest(member=self._member), timeout=_LEAVE_TIMEOUT_S)
        self._session.close()

    def _checkpoint(self, what: str, method: Callable[..., Any], name: str) -> str:
        digest = ""
        try:
            for progress in method(pb.CheckpointRequest(run=self.name, name=name), timeout=_CALL_TIMEOUT_S):
                digest = progress.digest
        except grpc.RpcError as error:
            raise from_rpc(error, what) from error
        return digest

    def _call(self, what: str, method: Callable[..., Any], request: object, timeout_s: float) -> Any:
        try:
            return method(request, timeout=timeout_s + _ANSWER_SLACK_S)
        except grpc.RpcError as error:
            raise from_rpc(error, what) from error

    def _chunks(self, tensors: AdapterTensors, step: int) -> Iterator[pb.AdapterChunk]:
        for key, tensor in sorted(tensors.items(), key=lambda entry: entry[0].part == "step"):  # after what they count
            values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
            view = byte_view(values)
            for offset in range(0, view.nbytes, MAX_PAYLOAD_BYTES):
                yield pb.AdapterChunk(
                    run=self.name,
                    layer=key.layer,
                    tensor=key.tensor,
                    part=PARTS[key.part],
                    shape=tuple(values.shape),
                    offset=offset,
                    data=bytes(view[offset : offset + MAX_PAYLOAD_BYTES]),
                    step=step,
                )

    def _header(self, op: Op, layer: int, tokens: int, hidden: int) -> Header:
        return Header(
            FrameType.OPEN, layer=layer, op=op, dtype=_WIRE_FRAME_DTYPES[self.wire_dtype], tokens=tokens, hidden=hidden
        )

    def _recycle(self, sent: dict[Tensor, tuple[Dtype, HostTensor]]) -> None:
        for _, host in sent.values():
            if host.ready is not None:
                self._staging.give_back(host.tensor)


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
