"""Forward and backward of one layer for one member."""

from __future__ import annotations

from dataclasses import dataclass

import kt_expert_native as native
import numpy as np
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.lora import TENSORS
from kt_expert_proto.v1.session_pb2 import ResultHead
from numpy.typing import NDArray

from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.adapters.window import GradientWindow
from kt_expert_server.engine.budget import MemoryBudget, Reservation
from kt_expert_server.engine.buffers import BufferPool, PooledBuffer
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.tickets import SavedTicket, Tickets
from kt_expert_server.engine.work import Outcome, Work
from kt_expert_server.model.loader import LoadedLayer
from kt_expert_server.observe.observer import Observer

_DTYPE_NAMES = {Dtype.BF16: "bf16", Dtype.FP32: "fp32"}
_PRODUCT_FLOP = 6.0  # three products of H x I per route, two flop per multiply-add; LoRA is left out on purpose
_BACKWARD_COST = 1.3  # of a forward's time, measured over batch sizes


@dataclass(frozen=True, slots=True)
class Tools:
    """What every pass needs."""

    engine: native.Engine
    budget: MemoryBudget
    pool: BufferPool
    observer: Observer


@dataclass(frozen=True, slots=True)
class Trained:
    """What a member's passes work on."""

    owner: str
    adapter: Adapter
    window: GradientWindow
    tickets: Tickets
    ticket_policy: str  # what a ticket keeps: "activations" or "inputs"


class ForwardWork(Work):
    """y = experts(x), and a ticket under the request's id if asked for.

    tensors: HIDDEN_STATES [T, H], EXPERT_IDS int32 [T, k], ROUTING_WEIGHTS fp32 [T, k].
    """

    kind = "forward"

    def __init__(
        self, tools: Tools, trained: Trained, layer: LoadedLayer, header: Header, tensors: dict[Tensor, PooledBuffer],
        *, top_k: int, save: bool, use_adapter: bool, dropout_seed: int, token: native.CancelToken,
    ) -> None:  # fmt: skip
        super().__init__()
        self.token = token
        self._tools, self._trained, self._layer, self._header = tools, trained, layer, header
        self._adapter = trained.adapter.layers.get(header.layer) if use_adapter else None
        self._policy = trained.ticket_policy if save else "nothing"
        self._seed = dropout_seed
        self._top_k = top_k
        self._x = tensors[Tensor.HIDDEN_STATES].array(header.dtype, header.rows, header.columns)
        self._ids = tensors[Tensor.EXPERT_IDS].array(Dtype.INT32, header.rows, top_k)
        self._weights = tensors[Tensor.ROUTING_WEIGHTS].array(Dtype.FP32, header.rows, top_k)
        self._saved: Reservation | None = None
        self._ticket: native.Ticket | None = None
        self._y: PooledBuffer | None = None
        self.cost = float(header.rows * top_k + layer.plan.num_experts)

    def prepare(self) -> None:
        tools, owner, rows = self._tools, self._trained.owner, self._header.rows
        lora = self._adapter.spec if self._adapter is not None else native.LoraSpec()
        scratch = tools.engine.scratch_bytes(self._layer.spec, lora, rows, self._top_k)
        self.held.add(tools.budget.reserve(Kind.SCRATCH, scratch, owner, f"a forward of {rows} tokens"))
        if self._policy != "nothing":
            dtype = _DTYPE_NAMES[self._header.dtype]
            size = tools.engine.ticket_bytes(self._layer.spec, lora, rows, self._top_k, dtype, self._policy)
            self._saved = tools.budget.reserve(Kind.TICKETS, size, owner, f"the ticket of {rows} tokens")
        self._y = tools.pool.take(self._header.tensor_bytes)

    def run(self) -> None:
        assert self._y is not None  # noqa: S101
        self._ticket = self._tools.engine.forward(
            self._layer.weights,
            self._adapter.parameters if self._adapter is not None else None,
            self._x,
            self._ids,
            self._weights,
            self._y.array(self._header.dtype, self._header.rows, self._header.columns),
            self._policy,
            self.token,
            self._seed,
            self._header.layer,
        )

    def commit(self) -> Outcome:
        assert self._y is not None  # noqa: S101
        if self._ticket is not None and self._saved is not None:
            self._saved.shrink(self._ticket.nbytes)
            saved = SavedTicket(
                self._ticket, self._header.layer, self._adapter is not None, self._trained.adapter.version, self._saved
            )
            self._trained.tickets.add(self._header.request_id, saved)
            self._saved = self._ticket = None
        _report(self._tools.observer, self.kind, self._layer, self._header.rows, self._top_k)
        _report_imbalance(self._tools.observer, self._layer, self._ids)
        y, self._y = self._y, None
        about = Header(
            FrameType.TENSOR, layer=self._header.layer, op=Op.FORWARD, tensor=Tensor.OUTPUT, dtype=self._header.dtype,
            rows=self._header.rows, columns=self._header.columns,
        )  # fmt: skip
        return Outcome(ResultHead(), [(about, y)])

    def end(self) -> None:
        super().end()
        if self._saved is not None:
            self._saved.release()
        if self._y is not None:
            self._y.release()
            self._y = None


class BackwardWork(Work):
    """dx and d(routing weights) from a ticket and dy [T, H]; adds LoRA's gradients to the member's window.

    Consumes the ticket. Where anything fails or is cancelled, window and ticket are as they were.
    """

    kind = "backward"

    def __init__(
        self, tools: Tools, trained: Trained, layer: LoadedLayer, header: Header, dy: PooledBuffer,
        *, ticket: int, begin_window: bool, token: native.CancelToken,
    ) -> None:  # fmt: skip
        super().__init__()
        self.token = token
        self._tools, self._trained, self._layer, self._header = tools, trained, layer, header
        self._ticket_id, self._begins = ticket, begin_window
        self._dy = dy.array(header.dtype, header.rows, header.columns)
        self._saved: SavedTicket | None = None
        self._dx: PooledBuffer | None = None
        self._d_weights: PooledBuffer | None = None
        self.cost = _BACKWARD_COST * (header.rows * layer.plan.top_k + layer.plan.num_experts)

    def prepare(self) -> None:
        # Looked up here and not on arrival: meanwhile the ticket may have been used and the adapter replaced.
        tools, header, trained = self._tools, self._header, self._trained
        self._saved = trained.tickets.find(self._ticket_id, header.layer, trained.adapter.version)
        lora = native.LoraSpec()
        if self._saved.with_adapter:
            lora = trained.adapter.layer(header.layer).spec
        top_k = self._saved.ticket.top_k
        scratch = tools.engine.scratch_bytes(self._layer.spec, lora, header.rows, top_k)
        self.held.add(tools.budget.reserve(Kind.SCRATCH, scratch, trained.owner, f"a backward of {header.rows} tokens"))
        self._dx = tools.pool.take(header.tensor_bytes)
        self._d_weights = tools.pool.take(header.rows * top_k * 4)

    def run(self) -> None:
        saved, header, trained = self._saved, self._header, self._trained
        assert saved is not None and self._dx is not None and self._d_weights is not None  # noqa: S101, PT018
        adapter = trained.adapter.layers[header.layer] if saved.with_adapter else None
        gradients = None if adapter is None else trained.window.accumulator(header.layer, adapter)
        self._tools.engine.backward(
            self._layer.weights,
            None if adapter is None else adapter.parameters,
            gradients,
            saved.ticket,
            self._dy,
            self._dx.array(header.dtype, header.rows, header.columns),
            self._d_weights.array(Dtype.FP32, header.rows, saved.ticket.top_k),
            self.token,
            replaced=list(TENSORS) if self._begins or not trained.window.counts(header.layer) else [],
        )

    def commit(self) -> Outcome:
        saved, header, trained = self._saved, self._header, self._trained
        assert saved is not None and self._dx is not None and self._d_weights is not None  # noqa: S101, PT018
        if self._begins:
            trained.window.close()
        if saved.with_adapter:
            trained.window.add(header.layer)
        top_k = saved.ticket.top_k
        trained.tickets.drop(self._ticket_id, f"consumed by backward request {header.request_id}")
        _report(self._tools.observer, self.kind, self._layer, header.rows, top_k)
        weights = Header(
            FrameType.TENSOR, layer=header.layer, op=Op.BACKWARD, tensor=Tensor.GRAD_ROUTING_WEIGHTS, dtype=Dtype.FP32,
            rows=header.rows, columns=top_k,
        )  # fmt: skip
        hidden = Header(
            FrameType.TENSOR, layer=header.layer, op=Op.BACKWARD, tensor=Tensor.GRAD_HIDDEN_STATES, dtype=header.dtype,
            rows=header.rows, columns=header.columns,
        )  # fmt: skip
        outcome = Outcome(ResultHead(), [(weights, self._d_weights), (hidden, self._dx)])
        self._dx = self._d_weights = None
        return outcome

    def end(self) -> None:
        super().end()
        self._saved = None
        for buffer in (self._dx, self._d_weights):
            if buffer is not None:
                buffer.release()
        self._dx = self._d_weights = None


def _report(observer: Observer, direction: str, layer: LoadedLayer, tokens: int, top_k: int) -> None:
    flops = _PRODUCT_FLOP * tokens * top_k * layer.plan.hidden_size * layer.plan.intermediate_size
    observer.computed(direction, tokens, flops)


def _report_imbalance(observer: Observer, layer: LoadedLayer, expert_ids: NDArray[np.int32]) -> None:
    counts = np.bincount(expert_ids.reshape(-1), minlength=layer.plan.num_experts)[: layer.plan.num_experts]
    if counts.sum():
        observer.imbalance(layer.plan.layer, float(counts.max() / counts.mean()))
