"""Forward and backward of one request, and the optimizer step of a run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import kt_expert_native as native
import numpy as np
from numpy.typing import NDArray

from kt_expert_server.errors import DeadlinePassed, InvalidRequest, NotFound, WrongPhase
from kt_expert_server.model.loader import LoadedLayer
from kt_expert_server.runtime.engine_queue import EngineQueue
from kt_expert_server.runtime.memory import Kind
from kt_expert_server.runtime.observer import Observer
from kt_expert_server.runtime.optimizer import StepParams, agreed_params
from kt_expert_server.runtime.registry import Registry
from kt_expert_server.runtime.run import LayerAdapter, Member, Run, SavedTicket

Tokens = NDArray[np.uint16] | NDArray[np.float32]
LayerGradients = tuple[int, LayerAdapter, list[native.LoraTensors]]  # a layer, its adapter, gradients in rank order


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """Validated shapes: x [T, H], expert_ids int32 [T, k], routing_weights fp32 [T, k]."""

    request_id: int
    layer: int
    x: Tokens
    expert_ids: NDArray[np.int32]
    routing_weights: NDArray[np.float32]
    save_for_backward: bool
    use_adapter: bool
    dropout_seed: int = 0  # nothing is dropped


@dataclass(frozen=True, slots=True)
class BackwardRequest:
    """Validated shapes: dy [T, H] of the ticket's T."""

    request_id: int
    layer: int
    ticket: int
    dy: Tokens
    begin_window: bool


class Compute:
    """Runs requests on the engine for the registry's members."""

    def __init__(self, registry: Registry, queue: EngineQueue, observer: Observer) -> None:
        self._registry = registry
        self._queue = queue
        self._observer = observer

    async def forward(self, member: Member, request: ForwardRequest, token: native.CancelToken) -> Tokens:
        """Returns y [T, H] in the dtype of x; keeps a ticket under the request's id if asked to."""
        layer = self._registry.loaded_model().layers[request.layer]
        adapter = member.run.adapters.get(request.layer) if request.use_adapter else None
        lora = adapter.spec if adapter is not None else native.LoraSpec()
        tokens, top_k = request.expert_ids.shape
        budget, dtype = self._registry.budget, "bf16" if request.x.dtype == np.uint16 else "fp32"
        scratch = self._queue.engine.scratch_bytes(layer.spec, lora, tokens, top_k)
        policy = member.run.config.tickets if request.save_for_backward else "nothing"
        saved = 0
        if request.save_for_backward:
            saved = self._queue.engine.ticket_bytes(layer.spec, lora, tokens, top_k, dtype, policy)
        queued = time.monotonic()
        async with self._queue.turn():
            require_joined(member)
            with budget.held(Kind.SCRATCH, scratch, f"a forward of {tokens} tokens"):
                budget.reserve(Kind.TICKETS, saved, f"the ticket of {tokens} tokens")
                try:
                    y, ticket = await self._run_forward(layer, adapter, request, policy, token, queued)
                except BaseException:
                    budget.release(Kind.TICKETS, saved)
                    raise
            if ticket is not None and member.has_left:
                budget.release(Kind.TICKETS, saved)
            elif ticket is not None:
                actual = ticket.nbytes
                budget.release(Kind.TICKETS, saved - actual)
                member.tickets[request.request_id] = SavedTicket(
                    ticket, request.layer, adapter is not None, member.run.adapter_version, actual
                )
        return y

    async def _run_forward(
        self,
        layer: LoadedLayer,
        adapter: LayerAdapter | None,
        request: ForwardRequest,
        policy: str,
        token: native.CancelToken,
        queued: float,
    ) -> tuple[Tokens, native.Ticket | None]:
        y = np.empty_like(request.x)

        def work() -> tuple[native.Ticket | None, float, float]:
            begun = time.monotonic()
            ticket = self._queue.engine.forward(
                layer.weights,
                adapter.parameters if adapter is not None else None,
                request.x,
                request.expert_ids,
                request.routing_weights,
                y,
                policy,
                token,
                request.dropout_seed,
                request.layer,
            )
            return ticket, begun, time.monotonic()

        ticket, begun, ended = await self._queue.run(work)
        self._report("forward", layer, request.expert_ids.shape, queued, begun, ended)
        self._report_imbalance(layer, request.expert_ids)
        return y, ticket

    async def backward(
        self, member: Member, request: BackwardRequest, token: native.CancelToken
    ) -> tuple[Tokens, NDArray[np.float32]]:
        """Returns dx [T, H] and d_routing_weights [T, k]; consumes the ticket and adds to the member's gradients."""
        queued = time.monotonic()
        async with self._queue.turn():
            # Looked up inside the turn: between arrival and turn the ticket may have been used and the adapter replaced.
            require_joined(member)
            saved = self._ticket(member, request)
            layer = self._registry.loaded_model().layers[saved.layer]
            adapter = member.run.adapters.get(saved.layer) if saved.with_adapter else None
            lora = adapter.spec if adapter is not None else native.LoraSpec()
            tokens = request.dy.shape[0]
            scratch = self._queue.engine.scratch_bytes(layer.spec, lora, tokens, layer.plan.top_k)
            with self._registry.budget.held(Kind.SCRATCH, scratch, f"a backward of {tokens} tokens"):
                result = await self._run_backward(member, layer, adapter, saved, request, token, queued)
            if request.begin_window:
                member.close_window()
            if adapter is not None:
                member.window.add(saved.layer)
            if request.ticket in member.tickets:
                how = f"consumed by backward request {request.request_id}"
                self._registry.drop_ticket(member, request.ticket, how)
        return result

    async def _run_backward(
        self,
        member: Member,
        layer: LoadedLayer,
        adapter: LayerAdapter | None,
        saved: SavedTicket,
        request: BackwardRequest,
        token: native.CancelToken,
        queued: float,
    ) -> tuple[Tokens, NDArray[np.float32]]:
        dx = np.empty_like(request.dy)
        d_weights = np.empty((request.dy.shape[0], layer.plan.top_k), np.float32)

        def work() -> tuple[float, float]:
            begun = time.monotonic()
            gradients = None
            if adapter is not None:
                fresh = request.begin_window or saved.layer not in member.window
                gradients = window_gradients(member, saved.layer, layer.spec, adapter.spec, fresh=fresh)
            self._queue.engine.backward(
                layer.weights,
                adapter.parameters if adapter is not None else None,
                gradients,
                saved.ticket,
                request.dy,
                dx,
                d_weights,
                token,
            )
            return begun, time.monotonic()

        begun, ended = await self._queue.run(work)
        self._report("backward", layer, d_weights.shape, queued, begun, ended)
        return dx, d_weights

    def _ticket(self, member: Member, request: BackwardRequest) -> SavedTicket:
        saved = member.tickets.get(request.ticket)
        if saved is None:
            how = member.consumed.get(request.ticket)
            if how is not None:
                raise WrongPhase(f"ticket {request.ticket} was already {how}; a ticket serves exactly one backward")
            raise NotFound(
                f"ticket {request.ticket} does not exist; run the forward with save_for_backward and name its request id"
            )
        if saved.layer != request.layer:
            raise InvalidRequest(f"ticket {request.ticket} belongs to layer {saved.layer}, not to layer {request.layer}")
        if saved.with_adapter and saved.adapter_version != member.run.adapter_version:
            raise WrongPhase(
                f"the adapter changed since the forward of ticket {request.ticket}; run the forward again, then backward"
            )
        return saved

    def _report(
        self,
        direction: str,
        layer: LoadedLayer,
        routes: tuple[int, ...],
        queued: float,
        begun: float,
        ended: float,
    ) -> None:
        plan = layer.plan
        self._observer.stage(direction, "queue", begun - queued)
        self._observer.stage(direction, "compute", ended - begun)
        # Three products of H x I per route, two flop per multiply-add; LoRA is left out on purpose.
        flops = 6.0 * routes[0] * routes[1] * plan.hidden_size * plan.intermediate_size
        self._observer.computed(direction, routes[0], flops)

    def _report_imbalance(self, layer: LoadedLayer, expert_ids: NDArray[np.int32]) -> None:
        counts = np.bincount(expert_ids.reshape(-1), minlength=layer.plan.num_experts)[: layer.plan.num_experts]
        if counts.sum():
            self._observer.imbalance(layer.plan.layer, float(counts.max() / counts.mean()))

    async def grad_norm(self, run: Run) -> float:
        """L2 norm over all layers of the gradients averaged over the world size."""

        async with self._queue.turn():
            layers = all_gradients(run)
            scale, engine = 1.0 / run.config.world_size, self._queue.engine
            return await self._queue.run(
                lambda: sum(engine.gradient_square_sum(scale, gradients) for _, _, gradients in layers) ** 0.5
            )

    async def step(self, run: Run, said: Mapping[int, StepParams]) -> int:
        """Averages, clips and applies the optimizer once, then closes every member's window. Returns the new step count."""
        params = agreed_params(said)
        async with self._queue.turn():
            index, layers = run.step + 1, all_gradients(run)
            step = native.OptimizerStep(params.updates(), grad_scale=params.grad_scale / run.config.world_size)
            model, kind = self._registry.loaded_model(), params.state_kind

            def work() -> None:
                # All memory first: from the first update on nothing may fail. A layer that saw no backward is not here;
                # it keeps its parameters and moments, as torch does for a parameter without a gradient.
                if params.new_optimizer:
                    drop_moments(run)
                for _, adapter, _ in layers:
                    require_kind(run, adapter, kind)
                states = [ensure_state(run, adapter, model.layers[layer].spec, kind) for layer, adapter, _ in layers]
                updates = [
                    (gradients, adapter.parameters, state)
                    for (_, adapter, gradients), state in zip(layers, states, strict=True)
                ]
                self._queue.engine.step(step, updates)

            begun = time.monotonic()
            await self._queue.run(work)
            self._observer.step(time.monotonic() - begun)
            run.adapter_version += 1
            for member in run.members.values():
                member.close_window()
        return index

    async def wait_for_request(self, member: Member, request_id: int, timeout_s: float) -> None:
        """Waits until the request and all before it have their outcome. It may still be on its way when this is called."""

        def has_outcome() -> bool:
            require_joined(member)
            unfinished = [*member.running, *member.dropped]
            return member.last_request_id >= request_id and all(other > request_id for other in unfinished)

        try:
            await member.changed.wait_for(has_outcome, timeout_s)
        except TimeoutError:
            raise DeadlinePassed(
                f"request {request_id} had no outcome within {timeout_s:g} s; the last one that arrived is "
                f"{member.last_request_id}"
            ) from None


def window_gradients(
    member: Member, layer: int, layer_spec: native.LayerSpec, lora_spec: native.LoraSpec, *, fresh: bool
) -> native.LoraTensors:
    """The member's accumulators of one layer, zeroed where `fresh`: the window's first backward through it."""
    if layer not in member.gradients:
        member.gradients[layer] = native.LoraTensors(layer_spec, lora_spec)
    elif fresh:
        member.gradients[layer].zero()
    return member.gradients[layer]


def require_joined(member: Member) -> None:
    """Raises WrongPhase for a member that left while its request waited."""
    if member.has_left:
        raise WrongPhase(f"rank {member.rank} has left run {member.run.name!r}; join it again")


def all_gradients(run: Run) -> list[LayerGradients]:
    """Layers that saw a backward in this window, each with its gradients in rank order. Raises WrongPhase for a rank that
    left: the average would lack its part."""
    if len(run.members) != run.config.world_size:
        missing = sorted(set(range(run.config.world_size)) - set(run.members))
        raise WrongPhase(f"ranks {missing} have left run {run.name!r}; all {run.config.world_size} are needed")
    found = [(layer, adapter, rank_gradients(run, layer)) for layer, adapter in run.adapters.items()]
    return [entry for entry in found if entry[2]]


def rank_gradients(run: Run, layer: int) -> list[native.LoraTensors]:
    """Gradients of one layer in rank order, of the members that touched it in this window."""
    return [run.members[rank].gradients[layer] for rank in sorted(run.members) if layer in run.members[rank].window]


def require_kind(run: Run, adapter: LayerAdapter, kind: str) -> None:
    """Raises WrongPhase where a layer has taken updates of another kind."""
    if adapter.state is not None and adapter.state.kind != kind and has_updates(adapter.state):
        raise WrongPhase(
            f"run {run.name!r} has taken {run.step} steps with {adapter.state.kind} and is asked for {kind}; say that "
            "the optimizer is new (StepRequest.new_optimizer) to forget its moments"
        )


def ensure_state(run: Run, adapter: LayerAdapter, layer_spec: native.LayerSpec, kind: str) -> native.OptimizerState:
    """The layer's optimizer state; one of another kind is replaced."""
    if adapter.state is not None and adapter.state.kind != kind:
        adapter.state = None  # before the new one is made: only one is reserved
    if adapter.state is None:
        adapter.state = native.OptimizerState(layer_spec, adapter.spec, kind, run.config.moment_dtype)
    return adapter.state


def drop_moments(run: Run) -> None:
    """Of every layer, of the ones too that saw no gradient in this window. They are freed before new ones are made: only
    one set is reserved, and a step that then lacks memory is asked for again with the same words."""
    for adapter in list(run.adapters.values()):
        adapter.state = None


def has_updates(state: native.OptimizerState) -> bool:
    return any(state.tensor("step", name).any() for name in state.names())
