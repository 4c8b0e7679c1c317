"""Forward of one layer for one member, and what it shares with the backward (backward.py)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import kt_expert_native as native
import numpy as np
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.lora import LayerLora
from kt_expert_proto.v1.session_pb2 import ResultHead
from numpy.typing import NDArray

from kt_expert_server.adapters.adapter import Adapter
from kt_expert_server.adapters.sizes import TrainingBytes
from kt_expert_server.adapters.stacking import Active, Scales, stack, stacked_spec
from kt_expert_server.adapters.tensor_sets import find_adapter
from kt_expert_server.adapters.window import Windows
from kt_expert_server.engine.budget import MemoryBudget, Reservation
from kt_expert_server.engine.buffers import BufferPool, PooledBuffer, TensorMemory
from kt_expert_server.engine.fast_path import NOT_GRANTED, FastForward, FastForwards
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.tickets import SavedTicket, Tickets, UsedAdapter, UsedWeights
from kt_expert_server.engine.training_memory import reserve_training
from kt_expert_server.engine.work import Outcome, Work
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.loader import LoadedLayer
from kt_expert_server.observe.observer import Observer

_DTYPE_NAMES = {Dtype.BF16: "bf16", Dtype.FP32: "fp32"}
# A pass is computed in parts of so many tokens, between which others get the engine. Enough that reading weights does not
# count: half of it costs a layer of 128 experts a tenth, and twice as much gains nothing.
TILE_TOKENS = 1024
_PRODUCT_FLOP = 6.0  # three products of H x I per route, two flop per multiply-add; LoRA is left out on purpose


@dataclass(frozen=True, slots=True)
class Tools:
    """What every pass needs."""

    engine: native.Engine
    budget: MemoryBudget
    pool: BufferPool
    observer: Observer
    tile_tokens: int = TILE_TOKENS

    def parts(self, tokens: int) -> int:
        return max(1, -(-tokens // self.tile_tokens))

    def tile(self, part: int) -> slice:
        """Its tokens."""
        return slice(part * self.tile_tokens, (part + 1) * self.tile_tokens)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a member's passes work on."""

    owner: str
    adapters: Mapping[str, Adapter]
    windows: Windows
    tickets: Tickets
    ticket_policy: str  # what a ticket keeps: "activations" or "inputs"
    training: Callable[[Sequence[LayerLora]], TrainingBytes]  # what training such layers takes
    memory: TensorMemory | None = None  # that its trainer sees too
    fast: FastForwards | None = None  # of its trainer's connection

    def take(self, tools: Tools, size_bytes: int) -> PooledBuffer:
        """Memory for a tensor that goes to its trainer."""
        return (self.memory or tools.pool).take(size_bytes)

    def reserve_training(self, tools: Tools, adapter: Adapter) -> None:
        """Memory for its gradients and its optimizer, once. Raises OutOfCapacity."""
        if adapter.is_trained:
            return
        adapter.held += reserve_training(tools.budget.reserve, self.training(adapter.lora), self.owner, adapter.name)
        adapter.is_trained = True


@dataclass(frozen=True, slots=True)
class AskedAdapter:
    """An adapter that a forward names, with scales in place of the adapter's own."""

    name: str
    scales: tuple[float | None, float | None, float | None]


class PassWork(Work):
    """A pass over one layer's weights: alone, in parts, or as one part together with others'."""

    def __init__(self) -> None:
        super().__init__()
        self.stages_s: dict[str, float] = {}  # of the engine, of all parts
        self.together = 1  # batches in the same pass

    def add_stages(self, engine: native.Engine) -> None:
        """Of what the engine did last. A pass that counts does not fail for want of memory to say how long it took."""
        with suppress(MemoryError):
            for stage, seconds in engine.last_stages().items():
                self.stages_s[stage] = self.stages_s.get(stage, 0.0) + seconds

    @abstractmethod
    def arguments(self, part: int, token: native.CancelToken | None) -> tuple[Any, ...]:
        """Of the engine's function. On the engine's thread."""

    @abstractmethod
    def take(self, part: int, result: native.Ticket | None) -> None:
        """What the engine gave. On its thread."""

    @abstractmethod
    def token_of(self, part: int) -> native.CancelToken | None: ...


class ForwardWork(PassWork):
    """y = experts(x), and a ticket under the request's id if asked for.

    tensors: HIDDEN_STATES [T, H], EXPERT_IDS int32 [T, k], ROUTING_WEIGHTS fp32 [T, k].
    """

    kind = "forward"

    def __init__(
        self, tools: Tools, trained: Trained, layer: LoadedLayer, header: Header, tensors: dict[Tensor, PooledBuffer],
        *, top_k: int, save: bool, adapters: Sequence[AskedAdapter], dropout_seed: int, token: native.CancelToken,
    ) -> None:  # fmt: skip
        super().__init__()
        self.token = token
        self._tools, self._trained, self._layer, self._header = tools, trained, layer, header
        self._asked = adapters
        self._used: tuple[UsedAdapter, ...] = ()
        self._replaced: UsedWeights | None = None
        self._stacked: native.AdapterTensors | None = None
        self._policy = trained.ticket_policy if save else "nothing"
        self._seed = dropout_seed
        self._top_k = top_k
        self._x = tensors[Tensor.HIDDEN_STATES].array(header.dtype, header.rows, header.columns)
        self._ids = tensors[Tensor.EXPERT_IDS].array(Dtype.INT32, header.rows, top_k)
        self._weights = tensors[Tensor.ROUTING_WEIGHTS].array(Dtype.FP32, header.rows, top_k)
        self._saved: Reservation | None = None
        self._tickets: list[native.Ticket] = []
        self._y: PooledBuffer | None = None
        self.parts, self.tokens = tools.parts(header.rows), header.rows
        self.cost = header.rows * top_k / self.parts + layer.plan.num_experts

    def company(self) -> Hashable | None:
        adapters, layer = self._trained.adapters, self._header.layer
        asked = [adapters[each.name].layers.get(layer) for each in self._asked if each.name in adapters]
        if self.parts > 1 or any(each is not None and each.trained is not None for each in asked):
            return None
        return self.kind, layer, self._header.dtype

    def prepare(self) -> None:
        tools, owner, rows = self._tools, self._trained.owner, self._header.rows
        self._find_adapters()
        lora, stacked = self._lora()
        scratch = tools.engine.scratch_bytes(self._layer.spec, lora, min(rows, tools.tile_tokens), self._top_k)
        keeps = self._policy != "nothing"
        scratch += 0 if keeps else stacked
        self.held.add(tools.budget.reserve(Kind.SCRATCH, scratch, owner, f"a forward of {rows} tokens"))
        if keeps:
            dtype = _DTYPE_NAMES[self._header.dtype]
            # Each part's ticket has an index of the experts of its own.
            whole = tools.engine.ticket_bytes(self._layer.spec, lora, rows, self._top_k, dtype, self._policy)
            empty = tools.engine.ticket_bytes(self._layer.spec, lora, 0, self._top_k, dtype, self._policy)
            size = stacked + whole + (self.parts - 1) * empty
            self._saved = tools.budget.reserve(Kind.TICKETS, size, owner, f"the ticket of {rows} tokens")
        self._y = self._trained.take(tools, self._header.tensor_bytes)

    def _find_adapters(self) -> None:
        """Those that reach this layer. Raises NotFound for one the run does not have, InvalidRequest where two have weights."""
        used, weights = [], []
        for asked in self._asked:
            layer = find_adapter(self._trained.adapters, asked.name).layers.get(self._header.layer)
            if layer is not None and layer.trained is not None:
                weights.append(UsedWeights(asked.name, layer, layer.version))
            elif layer is not None:
                own = (layer.lora.scale_gate, layer.lora.scale_up, layer.lora.scale_down)
                gate, up, down = (mine if its is None else its for mine, its in zip(own, asked.scales, strict=True))
                used.append(UsedAdapter(asked.name, Active(layer, (gate, up, down)), layer.version))
        if len(weights) > 1:
            names = ", ".join(each.name for each in weights)
            raise InvalidRequest(
                f"adapters {names} all have weights of layer {self._header.layer}; a forward takes those of one"
            )
        self._used, self._replaced = tuple(used), weights[0] if weights else None

    def _lora(self) -> tuple[native.AdapterSpec, int]:
        """Ranks of what is active, and the bytes of a set of tensors for several together."""
        if not self._used:
            return native.AdapterSpec(), 0
        if len(self._used) == 1:
            return self._used[0].active.layer.spec, 0
        spec = stacked_spec([each.active for each in self._used])
        return spec, native.AdapterTensors.bytes_of(self._layer.spec, spec)

    def _parameters(self) -> tuple[native.AdapterTensors | None, Scales | None]:
        if not self._used:
            return None, None
        if len(self._used) == 1:
            active = self._used[0].active
            return active.layer.parameters, active.scales
        active_ones = [each.active for each in self._used]
        self._stacked = native.AdapterTensors(self._layer.spec, stacked_spec(active_ones))
        stack(active_ones, self._stacked)
        return self._stacked, None

    def run_part(self, part: int) -> None:
        ticket = self._tools.engine.forward(*self.arguments(part, self.token))
        self.add_stages(self._tools.engine)
        self.take(part, ticket)

    def token_of(self, part: int) -> native.CancelToken | None:
        del part
        return self.token

    def arguments(self, part: int, token: native.CancelToken | None) -> tuple[Any, ...]:
        assert self._y is not None  # noqa: S101
        if not part:
            self._active = self._parameters()
        parameters, scales = self._active
        tile = self._tools.tile(part)
        return (
            weights_of(self._layer, self._replaced),
            parameters,
            self._x[tile],
            self._ids[tile],
            self._weights[tile],
            self._y.array(self._header.dtype, self._header.rows, self._header.columns)[tile],
            self._policy,
            self._seed,
            self._header.layer,
            scales,
            tile.start,
            token,
        )

    def take(self, part: int, result: native.Ticket | None) -> None:
        del part
        if result is not None:
            self._tickets.append(result)

    def commit(self) -> Outcome:
        assert self._y is not None  # noqa: S101
        if self._saved is not None:
            stacked = 0 if self._stacked is None else self._stacked.nbytes
            self._saved.shrink(sum(ticket.nbytes for ticket in self._tickets) + stacked)
            tickets = tuple(self._tickets)
            saved = SavedTicket(tickets, self._header.layer, self._used, self._replaced, self._stacked, self._saved)
            self._trained.tickets.add(self._header.request_id, saved)
            self._saved, self._tickets = None, []
        report(self._tools.observer, self.kind, self._layer, self._header.rows, self._top_k)
        _report_imbalance(self._tools.observer, self._layer, self._ids)
        y, self._y = self._y, None
        about = Header(
            FrameType.TENSOR, layer=self._header.layer, op=Op.FORWARD, tensor=Tensor.OUTPUT, dtype=self._header.dtype,
            rows=self._header.rows, columns=self._header.columns,
        )  # fmt: skip
        return Outcome(ResultHead(fast_entry=self._fast_entry()), [(about, y)])

    def _fast_entry(self) -> int:
        """By which the like of this forward may be asked past all else, where nothing is kept of it."""
        fast, header = self._trained.fast, self._header
        few = header.rows <= native.FAST_TOKENS and header.tensor_bytes <= native.FAST_PAYLOAD_BYTES // 2
        if fast is None or self._policy != "nothing" or self._seed or len(self._used) > 1 or not few:
            return NOT_GRANTED
        parameters, scales = self._active
        lora = native.AdapterSpec() if not self._used else self._used[0].active.layer.spec
        key = header.layer, header.dtype, self._top_k, tuple((each.name, each.scales) for each in self._asked)
        scratch = self._tools.engine.scratch_bytes(self._layer.spec, lora, native.FAST_TOKENS, self._top_k)
        weights = weights_of(self._layer, self._replaced)
        dtype = _DTYPE_NAMES[header.dtype]
        return fast.grant(FastForward(key, weights, parameters, scales, dtype, self._top_k, scratch), self._trained.owner)

    def end(self) -> None:
        super().end()
        if self._saved is not None:
            self._saved.release()
        if self._y is not None:
            self._y.release()
            self._y = None


def weights_of(layer: LoadedLayer, used: UsedWeights | None) -> native.LayerWeights:
    """What a pass computes with."""
    trained = None if used is None else used.layer.trained
    return layer.weights if trained is None else trained.weights


def report(observer: Observer, direction: str, layer: LoadedLayer, tokens: int, top_k: int) -> None:
    flops = _PRODUCT_FLOP * tokens * top_k * layer.plan.hidden_size * layer.plan.intermediate_size
    observer.computed(direction, tokens, flops)


def _report_imbalance(observer: Observer, layer: LoadedLayer, expert_ids: NDArray[np.int32]) -> None:
    """Of batches in which each expert could have had a route: others say nothing about the router."""
    if expert_ids.size < layer.plan.num_experts:
        return
    counts = np.bincount(expert_ids.reshape(-1), minlength=layer.plan.num_experts)[: layer.plan.num_experts]
    if counts.sum():
        observer.imbalance(layer.plan.layer, float(counts.max() / counts.mean()))
