"""What a step asks of the optimizer, and the agreement of members on it."""

from __future__ import annotations

import pytest
from kt_expert_proto.lora import TENSORS
from kt_expert_server.adapters.step_params import ParamGroup, StepParams, agreed_params
from kt_expert_server.errors import InvalidRequest


def test_members_must_agree_on_a_step() -> None:
    def params(rate: float, scale: float, kind: str = "adamw", *, new: bool = False) -> StepParams:
        return StepParams((ParamGroup((), kind, (("learning_rate", rate),)),), scale, new)

    ours, close = params(1e-3, 0.5), params(1e-3, 0.50001)
    assert agreed_params({0: ours, 1: close}) == ours
    for other in (params(2e-3, 0.5), params(1e-3, 0.6), params(1e-3, 0.5, "sgd"), params(1e-3, 0.5, new=True)):
        with pytest.raises(InvalidRequest, match="rank 1 asked for another step than rank 0"):
            agreed_params({0: ours, 1: other})


def group(*tensors: str, kind: str = "sgd", rate: float = 1.0) -> ParamGroup:
    return ParamGroup(tensors, kind, (("learning_rate", rate),))


def test_groups_cover_every_tensor_once() -> None:
    updates = StepParams((group("b_up", "b_gate", rate=2.0), group()), 1.0).updates()
    assert set(updates) == set(TENSORS)
    assert updates["b_up"] is updates["b_gate"]
    assert updates["a_up"] is updates["b_down"] is not updates["b_up"]
    assert StepParams((group(kind="adam"), group("a_up", kind="adamw")), 1.0).state_kind == "adamw"


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([group("a_up")], "no group of the step holds a_gate"),
        ([group("a_up"), group("a_up"), group()], "names tensor 'a_up' twice"),
        ([group("a_side"), group()], "names tensor 'a_side' twice, or it is none of"),
        ([group(), group()], "two groups of a step name no tensors"),
        ([group(), group("a_up", kind="adamw")], "a step mixes sgd and adamw"),
        ([group(rate=-1.0)], "lr, expected at least 0"),
    ],
)
def test_groups_without_a_meaning_are_refused(groups: list[ParamGroup], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        StepParams(tuple(groups), 1.0).updates()
