"""Backward of one layer for one member."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import kt_expert_native as native
from kt_expert_proto.dtypes import Dtype
from kt_expert_proto.header import FrameType, Header, Op, Tensor
from kt_expert_proto.lora import tensor_names
from kt_expert_proto.v1.session_pb2 import ResultHead

from kt_expert_server.adapters.adapter import AdapterLayer
from kt_expert_server.adapters.stacking import add_gradients, stacked_spec
from kt_expert_server.adapters.window import present_bits
from kt_expert_server.engine.buffers import PooledBuffer
from kt_expert_server.engine.kinds import Kind
from kt_expert_server.engine.passes import PassWork, Tools, Trained, report, weights_of
from kt_expert_server.engine.tickets import SavedTicket
from kt_expert_server.engine.work import Outcome
from kt_expert_server.errors import InvalidRequest, WrongPhase
from kt_expert_server.model.loader import LoadedLayer

_BACKWARD_COST = 1.3  # of a forward's time, measured over batch sizes


@dataclass(frozen=True, slots=True)
class Target:
    """Which gradients of an adapter a backward adds to, and which of these first forget what they held. Bits of tensors."""

    adapter: str
    wanted: int
    replaced: int = 0
    continued: int = 0  # those that go on from what a step has taken


@dataclass(frozen=True, slots=True)
class _Into:
    """Where a target's gradients go, which, and which in place of what is there."""

    gradients: native.AdapterTensors
    wanted: list[str]
    replaced: list[str]


class BackwardWork(PassWork):
    """dx and d(routing weights) from a ticket and dy [T, H]; adds LoRA's and weights' gradients to the member's windows.

    Consumes the ticket unless it is kept. Where anything fails or is cancelled, windows and ticket are as they were; after the
    first part it is not cancelled any more, and all memory but the engine's scratch has been taken.
    """

    kind = "backward"

    def __init__(
        self, tools: Tools, trained: Trained, layer: LoadedLayer, header: Header, dy: PooledBuffer,
        *, ticket: int, keep_ticket: bool, targets: Sequence[Target], top_k: int, token: native.CancelToken,
    ) -> None:  # fmt: skip
        super().__init__()
        self.token = token
        self._tools, self._trained, self._layer, self._header = tools, trained, layer, header
        self._ticket_id, self._keeps, self._targets, self._top_k = ticket, keep_ticket, targets, top_k
        self._dy = dy.array(header.dtype, header.rows, header.columns)
        self._saved: SavedTicket | None = None
        self._dx: PooledBuffer | None = None
        self._d_weights: PooledBuffer | None = None
        self.parts, self.tokens = tools.parts(header.rows), header.rows
        self.cost = _BACKWARD_COST * (header.rows * top_k / self.parts + layer.plan.num_experts)
        self._into: dict[str, _Into] = {}
        self._into_weights: _Into | None = None
        self._together: _Into | None = None  # of several adapters, as one
        self._adds = False  # to gradients

    def company(self) -> Hashable | None:
        saved = self._trained.tickets.peek(self._ticket_id)
        if saved is None or saved.weights is not None or self.parts > 1 or any(map(self._is_of_weights, self._targets)):
            return None
        return self.kind, self._header.layer, self._header.dtype, self._trained.ticket_policy

    def prepare(self) -> None:
        # Looked up here and not on arrival: meanwhile the ticket may have been used and an adapter replaced.
        tools, header, trained = self._tools, self._header, self._trained
        self._saved = saved = trained.tickets.find(self._ticket_id, header.layer, trained.adapters)
        top_k = saved.tickets[0].top_k
        if top_k != self._top_k:
            raise InvalidRequest(
                f"the forward of ticket {self._ticket_id} routed each token to {top_k} experts, its backward says {self._top_k}"
            )
        tokens = sum(ticket.tokens for ticket in saved.tickets)
        if tokens != header.rows:
            raise InvalidRequest(f"the forward of ticket {self._ticket_id} had {tokens} tokens, its backward has {header.rows}")
        for target in self._targets:
            self._check_target(saved, target)
        lora, scratch = native.AdapterSpec(), 0
        if saved.stacked is not None:
            lora = stacked_spec([each.active for each in saved.used])
            scratch = saved.stacked.nbytes if self._targets else 0
        elif saved.used:
            lora = saved.used[0].active.layer.spec
        trains_weights = any(map(self._is_of_weights, self._targets))
        rows = min(header.rows, tools.tile_tokens)
        scratch += tools.engine.scratch_bytes(self._layer.spec, lora, rows, self._top_k, trains_weights)
        self.held.add(tools.budget.reserve(Kind.SCRATCH, scratch, trained.owner, f"a backward of {header.rows} tokens"))
        self._dx = trained.take(tools, header.tensor_bytes)
        self._d_weights = trained.take(tools, header.rows * self._top_k * 4)

    def _is_of_weights(self, target: Target) -> bool:
        adapter = self._trained.adapters.get(target.adapter)
        layer = None if adapter is None else adapter.layers.get(self._header.layer)
        return layer is not None and layer.trained is not None

    def _layer_of(self, saved: SavedTicket, target: Target) -> AdapterLayer | None:
        """What the forward used of the adapter. Weights that nothing has changed yet are the base model's: with them a forward
        was made before the adapter was."""
        used = next((each for each in saved.used if each.name == target.adapter), None)
        if used is not None:
            return used.active.layer
        if not self._is_of_weights(target):
            return None
        layer = self._trained.adapters[target.adapter].layers[self._header.layer]
        if saved.weights is None:
            return layer if layer.version == 0 else None
        return layer if saved.weights.name == target.adapter else None

    def _check_target(self, saved: SavedTicket, target: Target) -> None:
        """Raises InvalidRequest for gradients the forward has none of."""
        layer = self._layer_of(saved, target)
        there = 0 if layer is None else present_bits(layer)
        if target.wanted & ~there or (target.replaced | target.continued) & ~target.wanted:
            raise InvalidRequest(
                f"gradients {target.wanted:#x} of adapter {target.adapter!r} are wanted, {target.replaced:#x} of them anew; "
                f"the forward of ticket {self._ticket_id} can give {there:#x} of it"
            )
        missing = target.continued & ~self._trained.windows.of(target.adapter).there(self._header.layer)
        if missing:
            raise WrongPhase(
                f"{', '.join(tensor_names(missing))} of adapter {target.adapter!r} in layer {self._header.layer} are to go on "
                "from gradients that are not there any more: the server was started again since; clear the gradients first"
            )
        if target.wanted:
            self._trained.reserve_training(self._tools, self._trained.adapters[target.adapter])
            self._trained.windows.begin(target.adapter)

    def run_part(self, part: int) -> None:
        self._tools.engine.backward(*self.arguments(part, self.token_of(part)))
        self.add_stages(self._tools.engine)
        self.take(part, None)

    def take(self, part: int, result: native.Ticket | None) -> None:
        del result
        if self._together is not None and part == self.parts - 1:
            self._add_together()

    def _find_gradients(self, saved: SavedTicket) -> None:
        """All memory first, so that what comes after the first part does not fail for want of it."""
        self._into = {each.adapter: self._gradients_of(saved, each) for each in self._targets if each.wanted}
        of_weights = [each.adapter for each in self._targets if each.wanted and self._is_of_weights(each)]
        self._into_weights = self._into.pop(of_weights[0]) if of_weights else None
        if saved.stacked is not None and self._into:
            gradients = native.AdapterTensors(self._layer.spec, stacked_spec([each.active for each in saved.used]))
            self._together = _Into(gradients, gradients.names(), gradients.names())

    def _gradients_of(self, saved: SavedTicket, target: Target) -> _Into:
        window, index = self._trained.windows.of(target.adapter), self._header.layer
        layer = self._layer_of(saved, target)
        assert layer is not None  # noqa: S101  # prepare has looked
        replaced = target.replaced | target.wanted & ~(window.open(index) | target.continued)
        return _Into(window.accumulator(index, layer), tensor_names(target.wanted), tensor_names(replaced))

    def _add_together(self) -> None:
        saved, together = self._saved, self._together
        assert saved is not None and together is not None  # noqa: S101, PT018
        active, names = [each.active for each in saved.used], [each.name for each in saved.used]
        for name, each in self._into.items():
            add_gradients(active, together.gradients, names.index(name), each.gradients, each.wanted, each.replaced)

    def arguments(self, part: int, token: native.CancelToken | None) -> tuple[Any, ...]:
        saved = self._saved
        assert saved is not None and self._dx is not None and self._d_weights is not None  # noqa: S101, PT018
        if not part:
            self._find_gradients(saved)
        header, weights = self._header, self._into_weights
        if saved.stacked is not None:
            parameters: native.AdapterTensors | None = saved.stacked
            lora = self._together
        else:
            parameters = saved.used[0].active.layer.parameters if saved.used else None
            lora = next(iter(self._into.values()), None)
        both = [each for each in (lora, weights) if each is not None]
        self._adds = bool(both)
        tile = self._tools.tile(part)
        return (
            weights_of(self._layer, saved.weights),
            parameters,
            None if lora is None else lora.gradients,
            saved.tickets[part],
            self._dy[tile],
            self._dx.array(header.dtype, header.rows, header.columns)[tile],
            self._d_weights.array(Dtype.FP32, header.rows, self._top_k)[tile],
            [name for each in both for name in each.wanted],
            [name for each in both for name in each.replaced] if not part else [],
            None if weights is None else weights.gradients,
            token,
        )

    def token_of(self, part: int) -> native.CancelToken | None:
        """What has been added to a window cannot be taken out: from then on a backward counts whole."""
        return None if part and self._adds else self.token

    def commit(self) -> Outcome:
        saved, header, trained = self._saved, self._header, self._trained
        assert saved is not None and self._dx is not None and self._d_weights is not None  # noqa: S101, PT018
        for target in self._targets:
            trained.windows.of(target.adapter).add(header.layer, target.wanted)
        if not self._keeps:
            trained.tickets.drop(self._ticket_id, f"consumed by backward request {header.request_id}")
        report(self._tools.observer, self.kind, self._layer, header.rows, self._top_k)
        weights = Header(
            FrameType.TENSOR, layer=header.layer, op=Op.BACKWARD, tensor=Tensor.GRAD_ROUTING_WEIGHTS, dtype=Dtype.FP32,
            rows=header.rows, columns=self._top_k,
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
        self._saved = self._into_weights = self._together = None
        self._into = {}
        for buffer in (self._dx, self._d_weights):
            if buffer is not None:
                buffer.release()
        self._dx = self._d_weights = None
