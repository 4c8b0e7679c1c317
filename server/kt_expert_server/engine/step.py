"""Gradient norms and the optimizer step over all members of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import kt_expert_native as native
from kt_expert_proto.lora import tensor_names
from kt_expert_proto.v1.session_pb2 import ResultHead

from kt_expert_server.adapters.adapter import Adapter, AdapterLayer
from kt_expert_server.adapters.step_params import ParamGroup, StepParams, agreed_params
from kt_expert_server.adapters.tensor_sets import LayerSet, TensorSet, kept_bits, resolve
from kt_expert_server.adapters.window import Windows
from kt_expert_server.engine.work import Outcome, WholeWork
from kt_expert_server.errors import InvalidRequest, WrongPhase


@dataclass(frozen=True, slots=True)
class Collective:
    """The members' gradients, by rank, and what they belong to."""

    adapters: Mapping[str, Adapter]
    windows: Mapping[int, Windows]
    world_size: int

    def resolve(self, sets: Sequence[TensorSet]) -> list[LayerSet]:
        return list(resolve(self.adapters, list(self.windows.values()), sets))

    def gradients(self, each: LayerSet) -> list[native.AdapterTensors]:
        """In rank order, of the ranks that have some. Raises WrongPhase where nobody has a tensor's."""
        there = 0
        for windows in self.windows.values():
            there |= windows.of(each.adapter.name).there(each.index)
        if each.bits & ~there:
            raise WrongPhase(
                f"{', '.join(tensor_names(each.bits & ~there))} of adapter {each.adapter.name!r} in layer {each.index} have no "
                "gradients: no backward has added to them, or the server was started again since; run a backward first"
            )
        found = [windows.of(each.adapter.name).gradients(each.index, each.bits) for windows in self.windows.values()]
        return [gradients for gradients in found if gradients is not None]


class NormWork(WholeWork):
    """Norms of the gradients averaged over the world size: of each tensor that is named with its layer, and of all together."""

    def __init__(self, engine: native.Engine, members: Collective, sets: Sequence[TensorSet], order: float) -> None:
        super().__init__()
        self._engine, self._members, self._sets, self._order = engine, members, sets, order
        self._norms: list[float] = []
        self._total = 0.0

    def run(self) -> None:
        parts: list[float] = []
        self._norms = []
        for tensor_set in self._sets:
            for each in self._members.resolve([tensor_set]):
                gradients = self._members.gradients(each)
                found = self._engine.gradient_norms(self._order, 1.0 / self._members.world_size, gradients)
                of_layer = [found[name] for name in tensor_names(each.bits)]
                parts += of_layer
                self._norms += map(self._root, of_layer) if tensor_set.layers else ()
        self._total = self._root(self._join(parts)) if parts else 0.0

    def _root(self, part: float) -> float:
        return part if math.isinf(self._order) or self._order in (0.0, 1.0) else part ** (1.0 / self._order)

    def _join(self, parts: list[float]) -> float:
        if not math.isinf(self._order):
            return math.fsum(parts) if all(map(math.isfinite, parts)) else sum(parts)
        if any(map(math.isnan, parts)):
            return math.nan
        return max(parts) if self._order > 0 else min(parts)

    def commit(self) -> Outcome:
        return Outcome(ResultHead(norm=self._total, norms=self._norms))


@dataclass(slots=True)
class _LayerPlan:
    """What a step does to one layer of an adapter."""

    adapter: Adapter
    layer: AdapterLayer
    index: int
    tensors: dict[str, tuple[native.OptimizerUpdate, float]] = field(default_factory=dict)
    bits: int = 0
    kind: str = ""
    forgotten: set[str] = field(default_factory=set)


class StepWork(WholeWork):
    """Averages, scales and applies the optimizer once, then ends every member's gradients."""

    kind = "step"

    def __init__(self, engine: native.Engine, members: Collective, by_rank: Mapping[int, StepParams]) -> None:
        super().__init__()
        self._engine, self._members, self._by_rank = engine, members, by_rank
        self._groups: tuple[ParamGroup, ...] = ()
        self._plans: list[_LayerPlan] = []
        self._kept: dict[int, dict[str, dict[int, int]]] = {}

    def prepare(self) -> None:
        """Raises InvalidRequest where members ask for different steps, NotFound for what there is not."""
        members = self._members
        self._groups = agreed_params(self._by_rank).groups
        self._plans = self._plan()
        self._kept = {
            rank: kept_bits(members.adapters, members.windows[rank], each.kept) for rank, each in self._by_rank.items()
        }

    def _plan(self) -> list[_LayerPlan]:
        plans: dict[tuple[str, int], _LayerPlan] = {}
        for group in self._groups:
            update, scale = group.native(), group.grad_scale / self._members.world_size
            for each in self._members.resolve(group.sets):
                plan = plans.setdefault(
                    (each.adapter.name, each.index), _LayerPlan(each.adapter, each.layer, each.index, kind=group.state_kind)
                )
                if plan.kind != group.state_kind:
                    raise InvalidRequest(
                        f"a step asks for {plan.kind} and {group.state_kind} in layer {each.index} of adapter "
                        f"{each.adapter.name!r}; use one method for all tensors of a layer"
                    )
                names = tensor_names(each.bits)
                plan.tensors.update(dict.fromkeys(names, (update, scale)))
                plan.bits |= each.bits
                if group.new_optimizer:
                    plan.forgotten.update(names)
        return list(plans.values())

    def run(self) -> None:
        # All memory first: from the first update on nothing may fail. A tensor that saw no backward is not here; it keeps its
        # value and moments, as torch does for a parameter without a gradient.
        gradients = [self._members.gradients(LayerSet(plan.adapter, plan.index, plan.layer, plan.bits)) for plan in self._plans]
        for plan in self._plans:
            plan.layer.require_kind(plan.kind, plan.forgotten)
        for group in self._groups:
            if group.new_optimizer:
                self._forget_elsewhere(group)
        updates = []
        for plan, of_layer in zip(self._plans, gradients, strict=True):
            plan.layer.forget_moments(plan.forgotten)
            state = plan.layer.ensure_state(plan.kind, plan.adapter.moment_dtype)
            weights = None if plan.layer.trained is None else plan.layer.trained.weights
            updates.append((native.LayerStep(plan.tensors), of_layer, plan.layer.parameters, state, weights))
        self._engine.step(updates)

    def _forget_elsewhere(self, group: ParamGroup) -> None:
        """A new optimizer is new for tensors without a gradient too, where the set names no layers."""
        for each in group.sets:
            if not each.layers:
                for layer in self._members.adapters[each.adapter].layers.values():
                    layer.forget_moments(tensor_names(each.tensors) if each.tensors else layer.parameters.names())

    def commit(self) -> Outcome:
        for plan in self._plans:
            plan.layer.version += 1
        for rank, windows in self._members.windows.items():
            windows.end(self._kept.get(rank, {}))
        return Outcome(ResultHead())
