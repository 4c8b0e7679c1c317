"""Leases, draining and what a run reserves, on a registry of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from kt_expert_server.config import Limits
from kt_expert_server.errors import NotFound, OutOfCapacity, ServerUnavailable
from kt_expert_server.model.index import plan_model
from kt_expert_server.model.loader import load_model
from kt_expert_server.runtime.adapter_io import AdapterWriter, TensorId
from kt_expert_server.runtime.memory import Kind, MemoryBudget
from kt_expert_server.runtime.registry import Registry, State, initialise
from kt_expert_server.runtime.run import LayerLora, RunConfig

LORA = LayerLora(0, False, 2, 3, 4, 1.0, 1.0, 1.0)
GIB = 1024**3


def registry(checkpoint: Path, **limits: float) -> Registry:
    made = Registry(MemoryBudget(GIB), Limits(**limits), threads=2)  # type: ignore[arg-type]  # sizes and seconds
    made.become_ready(load_model(plan_model(checkpoint), "bf16", lambda _: None))
    return made


def config(world_size: int = 1) -> RunConfig:
    return RunConfig(world_size, "fp32", (LORA,), seed=3)


def test_nothing_is_served_while_the_model_loads() -> None:
    made = Registry(MemoryBudget(GIB), Limits(), threads=2)
    with pytest.raises(ServerUnavailable, match="still loading"):
        made.open_run("a", config(), ephemeral=True)


def test_a_member_without_a_stream_loses_its_lease(qwen3_checkpoint: Path) -> None:
    made = registry(qwen3_checkpoint, lease_s=0.0)
    run, created = made.open_run("a", config(), ephemeral=True)
    member = made.join("a", 0)
    assert created
    assert made.budget.total > 0
    assert made.expire() == [member]
    assert member.has_left
    assert run.name not in made.runs
    assert made.budget.total == 0
    with pytest.raises(NotFound, match="lease ran out"):
        made.member(member.token)


def test_a_run_nobody_joined_ends_with_the_lease_and_a_named_one_stays(qwen3_checkpoint: Path) -> None:
    made = registry(qwen3_checkpoint, lease_s=0.0)
    made.open_run("anonymous", config(), ephemeral=True)
    made.open_run("named", config(), ephemeral=False)
    made.expire()
    assert list(made.runs) == ["named"]


def test_a_run_reserves_parameters_gradients_per_rank_and_moments(qwen3_checkpoint: Path) -> None:
    made = registry(qwen3_checkpoint)
    run, _ = made.open_run("a", config(world_size=3), ephemeral=True)
    size = run.adapter_bytes
    assert size == 8 * 4 * (2 * (32 + 24) + 3 * (32 + 24) + 4 * (24 + 32))
    reserved = [made.budget.reserved(kind) for kind in (Kind.ADAPTERS, Kind.GRADIENTS, Kind.OPTIMIZER)]
    counts = 4 * 6  # how many updates each of the six tensors has seen, fp32
    assert reserved == [size, 3 * size, 2 * size + counts]


def test_a_run_that_does_not_fit_reserves_nothing(qwen3_checkpoint: Path) -> None:
    made = registry(qwen3_checkpoint)
    made.budget.record(Kind.WEIGHTS, GIB - 100_000)
    before = made.budget.total
    with pytest.raises(OutOfCapacity):
        made.open_run("a", config(world_size=100), ephemeral=True)
    assert made.budget.total == before
    assert not made.runs


def test_a_run_that_was_closed_takes_no_more_tensors(qwen3_checkpoint: Path) -> None:
    made = registry(qwen3_checkpoint)
    run, _ = made.open_run("a", config(), ephemeral=True)
    tensor, shape = TensorId(0, "a_gate", "parameter"), run.adapters[0].parameters.tensor("a_gate").shape
    data, writer = np.zeros(shape, np.float32).tobytes(), AdapterWriter(run, made.loaded_model())
    writer.write(tensor, shape, 0, data[:100], 0)
    made.close(run)
    with pytest.raises(NotFound, match="or was closed"):
        writer.write(tensor, shape, 100, data[100:], 0)


def test_draining_keeps_members_and_stopping_refuses_requests(qwen3_checkpoint: Path) -> None:
    made, heard = registry(qwen3_checkpoint), []
    made.on_drain(lambda: heard.append(made.state))
    made.open_run("a", config(), ephemeral=True)
    member = made.join("a", 0)
    made.drain()
    assert (made.state, made.is_stopping, heard) == (State.DRAINING, False, [State.DRAINING])
    assert made.join("a", 0, resume=member.token) is member
    with pytest.raises(ServerUnavailable, match="draining"):
        made.open_run("b", config(), ephemeral=True)
    made.stop()
    assert made.is_stopping


def test_initialisation_is_seeded_per_tensor_and_leaves_b_at_zero(qwen3_checkpoint: Path) -> None:
    values = []
    for name in ("a", "b"):
        made = registry(qwen3_checkpoint)
        run, _ = made.open_run(name, config(), ephemeral=True)
        initialise(run)
        values.append({t: run.adapters[0].parameters.tensor(t).copy() for t in run.adapters[0].parameters.names()})
    assert all(np.array_equal(values[0][name], values[1][name]) for name in values[0])
    assert not values[0]["b_gate"].any()
    assert 0 < np.abs(values[0]["a_down"]).max() <= 24**-0.5
    assert not np.array_equal(values[0]["a_gate"][:, :2], values[0]["a_up"][:, :2])
