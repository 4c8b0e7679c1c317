"""What a step asks of the optimizer, and the agreement of members on it."""

from __future__ import annotations

import pytest
from kt_expert_server.adapters.step_params import ParamGroup, StepParams, agreed_params
from kt_expert_server.adapters.tensor_sets import TensorSet
from kt_expert_server.errors import InvalidRequest

A_GATE, B_GATE, ALL = 1, 2, 0


def group(*sets: TensorSet, kind: str = "sgd", rate: float = 1.0, scale: float = 1.0, new: bool = False) -> ParamGroup:
    return ParamGroup(sets or (TensorSet("default", ALL, ()),), kind, (("learning_rate", rate),), scale, new)


def test_members_must_agree_on_a_step() -> None:
    ours, close = (StepParams((group(scale=scale),)) for scale in (0.5, 0.50001))
    assert agreed_params({0: ours, 1: close}) == ours
    others = (
        group(scale=0.5, rate=2.0), group(scale=0.6), group(scale=0.5, kind="adam"), group(scale=0.5, new=True),
        group(TensorSet("default", A_GATE, ()), scale=0.5), group(TensorSet("other", ALL, ()), scale=0.5),
    )  # fmt: skip
    for other in others:
        with pytest.raises(InvalidRequest, match="rank 1 asked for another step than rank 0"):
            agreed_params({0: ours, 1: StepParams((other,))})
    with pytest.raises(InvalidRequest, match="rank 1 asked for another step"):
        agreed_params({0: ours, 1: StepParams((group(scale=0.5), group()))})


def test_members_may_go_on_with_other_gradients() -> None:
    kept = StepParams((group(),), (TensorSet("default", A_GATE, (1,)),))
    assert agreed_params({0: StepParams((group(),)), 1: kept}) == StepParams((group(),))


@pytest.mark.parametrize(
    "groups",
    [
        [group(TensorSet("default", A_GATE, (0, 1))), group(TensorSet("default", A_GATE, (2,)))],
        [group(TensorSet("default", A_GATE, ())), group(TensorSet("default", B_GATE, (0,)))],
        [group(), group(TensorSet("other", ALL, ()))],
    ],
)
def test_groups_that_share_no_tensor(groups: list[ParamGroup]) -> None:
    StepParams(tuple(groups)).check()


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([group(TensorSet("default", A_GATE, (0, 1))), group(TensorSet("default", ALL, (1,)))], "is in two groups"),
        ([group(TensorSet("default", A_GATE, (0,)), TensorSet("default", A_GATE, (0,)))], "is in two groups"),
        ([group(TensorSet("default", A_GATE, (3,))), group()], "is in two groups"),
        ([group(rate=-1.0)], "lr, expected at least 0"),
    ],
)
def test_groups_without_a_meaning_are_refused(groups: list[ParamGroup], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        StepParams(tuple(groups)).check()
