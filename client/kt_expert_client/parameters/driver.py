"""torch optimizers that hold remote parameters: each step of theirs is a step on the server, with the rates and the moments of
each parameter, while torch's own code passes these parameters over."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from kt_expert_client.errors import UnsupportedModel
from kt_expert_client.optimizers import Sgd, Update, translate
from kt_expert_client.parameters.gradients import tensor_sets
from kt_expert_client.parameters.lora import LoraMatrix
from kt_expert_client.parameters.matrix import GradientSource, Matrix, MomentSource, gradient_of, matrix_of
from kt_expert_client.parameters.store import ParameterStore
from kt_expert_client.parameters.tensor import RemoteTensor, Stored, source_of

_ELSEWHERE = (
    ", or load the model with RunOptions(lora_location='trainer'): LoRA parameters are then kept here, where any optimizer "
    "works"
)
_SGD_SLOTS = ("momentum_buffer",)
_ADAM_SLOTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, eq=False, slots=True)
class _Taken:
    """A parameter that a step is for."""

    parameter: torch.Tensor
    matrix: Matrix
    gradient: GradientSource
    update: Update
    slots: tuple[str, ...]
    is_new: bool


class _Group:
    """One of an optimizer's groups, translated once for all its parameters: what the server is to do, or why it cannot."""

    def __init__(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.parameters: list[torch.Tensor] = group["params"]
        self.update: Update | UnsupportedModel
        try:
            self.update = translate(optimizer, group)
        except UnsupportedModel as error:
            self.update = error
        self.slots = _SGD_SLOTS if isinstance(self.update, Sgd) else _ADAM_SLOTS


class OptimizerDriver:
    """One pair of hooks for the whole process, through torch's own registration."""

    def __init__(self) -> None:
        self._hidden: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[tuple[torch.Tensor, torch.Tensor]]]
        self._hidden = weakref.WeakKeyDictionary()
        self._remove: list[Callable[[], None]] = []
        self._stores: weakref.WeakSet[ParameterStore] = weakref.WeakSet()

    def watch(self, store: ParameterStore) -> None:
        """Its parameters may be an optimizer's from now on."""
        self._stores.add(store)

    def install(self) -> None:
        """Does nothing where it is in place."""
        if not self._remove:
            from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

            self._remove = [
                register_optimizer_step_pre_hook(self._before).remove,
                register_optimizer_step_post_hook(self._after).remove,
            ]

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        taken = [
            (group, parameter)
            for group in (_Group(optimizer, each) for each in optimizer.param_groups)
            for parameter in group.parameters
            if matrix_of(parameter) is not None and parameter.grad is not None
        ]
        if not taken:
            return
        if any(callable(argument) for argument in (*args[1:], *kwargs.values())):
            raise UnsupportedModel(
                "optimizer.step(closure) computes gradients after the server has to know them; call backward, then step "
                "without a closure"
            )
        if not _found_inf(optimizer):  # else the gradient scaler has this step skipped
            self._step(optimizer, [_take(group, parameter) for group, parameter in taken])
        self._hidden[optimizer] = [(each, each.grad) for _, each in taken if each.grad is not None]
        for _, parameter in taken:
            parameter.grad = None

    def _after(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args, kwargs
        taken = self._hidden.pop(optimizer, [])
        for parameter, gradient in taken:
            parameter.grad = gradient
        matrices = [matrix for parameter, _ in taken if (matrix := matrix_of(parameter)) is not None]
        for store in self._stores:
            store.gradients.warn_of_untaken({matrix.place for matrix in matrices if matrix.store is store})

    def _step(self, optimizer: torch.optim.Optimizer, taken: list[_Taken]) -> None:
        stores = {each.matrix.store for each in taken}
        for store in stores:
            _step_one(store, optimizer, [each for each in taken if each.matrix.store is store])


def _step_one(store: ParameterStore, optimizer: torch.optim.Optimizer, taken: list[_Taken]) -> None:
    store.settle()
    gradients = store.gradients
    for each in taken:
        gradients.require_live(each.gradient)
        _upload_moments(optimizer, each)
    gradients.flush(scales=False)
    groups: dict[tuple[Update, float, bool], list[_Taken]] = {}
    for each in taken:
        scale = gradients.scale_of(each.matrix.place) / _grad_scale(optimizer)
        groups.setdefault((each.update, scale, each.is_new), []).append(each)
    messages = []
    for (update, scale, is_new), members in groups.items():
        message = update.group()
        message.sets.extend(each.to_proto() for each in tensor_sets(member.matrix.place for member in members))
        message.grad_scale, message.new_optimizer = scale, is_new
        messages.append(message)
    places = {each.matrix.place for each in taken}
    for each in taken:
        _before_change(optimizer, each)
    store.run.take_step(messages, gradients.kept(places))
    gradients.spent(places)
    store.changed(places)
    for each in taken:
        _count(optimizer, each)


def _before_change(optimizer: torch.optim.Optimizer, each: _Taken) -> None:
    """Late copies of the parameter and of its moments get what there is now."""
    state = optimizer.state.get(each.parameter, {})
    for tensor in (each.parameter, *(state.get(slot) for slot in each.slots)):
        source = source_of(tensor)
        if source is not None and source.copies is not None:
            source.copies.keep(source)


def _take(group: _Group, parameter: torch.Tensor) -> _Taken:
    matrix, gradient = matrix_of(parameter), gradient_of(parameter.grad)
    assert matrix is not None  # noqa: S101  # the caller has looked
    if gradient is None:
        raise UnsupportedModel(f".grad of {matrix.place} was replaced by a tensor of this process; use .grad.copy_()")
    if isinstance(group.update, UnsupportedModel):
        raise UnsupportedModel(f"{group.update}{_ELSEWHERE}" if isinstance(matrix, LoraMatrix) else str(group.update))
    state = group.optimizer.state.get(parameter, {})
    return _Taken(parameter, matrix, gradient, group.update, group.slots, is_new=not _has_moments(state, group.slots))


def _has_moments(state: dict[str, Any], slots: Iterable[str]) -> bool:
    return any(state.get(slot) is not None for slot in slots)


def _upload_moments(optimizer: torch.optim.Optimizer, each: _Taken) -> None:
    """Moments that were loaded into the optimizer go to the server before they are used."""
    state = optimizer.state.get(each.parameter, {})
    local: dict[str, torch.Tensor] = {}
    for slot in each.slots:
        moment, source = state.get(slot), source_of(state.get(slot))
        if isinstance(source, MomentSource) and source.matrix is each.matrix:
            source.require_live()
        elif isinstance(moment, torch.Tensor):  # values of its own, or of another parameter's moments
            local[slot] = moment.values() if isinstance(moment, RemoteTensor) else moment
    if local:
        each.matrix.store.begin_moments(each.matrix)
    count = int(state.get("step", 0 if not local else 1))
    for slot, values in local.items():
        each.matrix.write(values, slot, step=count)
        state[slot] = _moment(each, slot)
    if local:
        each.matrix.store.count_updates(each.matrix, count)


def _moment(each: _Taken, slot: str) -> RemoteTensor:
    made: RemoteTensor = RemoteTensor(Stored(_source(each, slot)), each.parameter, dtype=torch.float32)
    return made


def _source(each: _Taken, slot: str) -> MomentSource:
    return MomentSource(each.matrix, slot, each.matrix.store.moments_of(each.matrix))


def _count(optimizer: torch.optim.Optimizer, each: _Taken) -> None:
    """What the optimizer knows of the parameter after a step, under torch's names."""
    if each.is_new:
        each.matrix.store.begin_moments(each.matrix)
    state = optimizer.state[each.parameter]
    if isinstance(each.update, Sgd) and not each.update.momentum:
        state["momentum_buffer"] = None
        return
    generation = each.matrix.store.moments_of(each.matrix)
    for slot in each.slots:
        if not _is_of_generation(state.get(slot), generation):
            state[slot] = _moment(each, slot)
    if isinstance(each.update, Sgd):
        return
    count = int(state.get("step", 0)) + 1
    state["step"] = torch.tensor(float(count))
    each.matrix.store.count_updates(each.matrix, count)


def _is_of_generation(moment: object, generation: int) -> bool:
    """Whether it is a handle of the moments that the server has now."""
    source = source_of(moment)
    return isinstance(source, MomentSource) and source.generation == generation


def _found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """torch.amp.GradScaler's word to fused optimizers that this step is to be skipped."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) != 0.0


def _grad_scale(optimizer: torch.optim.Optimizer) -> float:
    """The factor gradients still carry: GradScaler leaves dividing by it to fused optimizers."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)
