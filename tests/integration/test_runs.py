"""Runs, members, barriers, checkpoints and the life of the process, through the client library."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import threading
from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import Adafactor, Adam, AdamW, Client, LayerLora, ParamGroup, Run, RunOptions, Sgd, TensorKey
from kt_expert_client.optimizers import Update
from support.batches import LAYERS, LORA, batch, train_step
from support.server import ServerProcess
from support.waiting import wait_until


def with_random_b(run: Run, seed: int = 0) -> None:
    """B starts at zero, where gradients of A vanish; random values make every tensor matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(value.shape, generator=generator) * 0.1 for key, value in run.get_adapter().items()}
    run.put_adapter(tensors)


@pytest.fixture
def client(server: ServerProcess) -> Client:
    with kt.connect(server.address) as connected:
        yield connected


def test_runs_do_not_see_each_other(client: Client) -> None:
    """A run's numbers are the same bits whether another run trains between its calls or not."""
    alone = client.open_run(lora=LORA, wire_dtype="fp32", seed=5)
    with_random_b(alone)
    for step in range(3):
        train_step(alone, step)
        alone.step(AdamW(1e-2))
    expected = alone.get_adapter()
    ours = client.open_run(lora=LORA, wire_dtype="fp32", seed=5)
    other = client.open_run(lora=LORA[:1], wire_dtype="bf16", seed=6)
    with_random_b(ours)
    for step in range(3):
        train_step(ours, step)
        x, ids, weights = batch(7, 100 + step)
        handle = other.submit_forward(0, x, ids, weights)
        other.submit_backward(0, handle.ticket, handle.result()).result()
        other.step(AdamW(0.5))
        ours.step(AdamW(1e-2))
    got = ours.get_adapter()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_two_members_equal_one_with_twice_the_batch(client: Client) -> None:
    single = client.open_run(lora=LORA, wire_dtype="fp32", seed=1)
    members = [
        client.open_run("pair", lora=LORA, rank=rank, world_size=2, wire_dtype="fp32", seed=1, ephemeral=True)
        for rank in range(2)
    ]
    norms: dict[int, float] = {}

    def train(rank: int) -> None:
        for step in range(3):
            train_step(members[rank], 10 * step + rank)
            norms[rank] = members[rank].grad_norm(timeout_s=30)
            members[rank].step(AdamW(1e-2), grad_scale=0.7, timeout_s=30)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for step in range(3):
        for rank in range(2):
            train_step(single, 10 * step + rank, scale=0.5)  # the mean over both halves
        norm = single.grad_norm()
        single.step(AdamW(1e-2), grad_scale=0.7)
    for thread in threads:
        thread.join(60)
    assert norms[0] == norms[1] == pytest.approx(norm, rel=1e-5)
    got, expected = members[0].get_adapter(), single.get_adapter()
    # Adam divides by the gradient's own size, so an order of summation can move a parameter by a part of the step.
    assert all(torch.allclose(got[key], expected[key], atol=2e-5) for key in expected)


def test_step_and_norm_repeat_harmlessly(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    train_step(run, 0)
    run.step(AdamW(1e-2))
    after = run.get_adapter()
    run._step -= 1  # as after an answer that was lost
    assert run.step(AdamW(1e-2)) == 1
    again = run.get_adapter()
    assert all(torch.equal(again[key], after[key]) for key in after)


def test_zero_grad_forgets_the_window(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    train_step(run, 0)
    assert run.grad_norm() > 0
    run.zero_grad()
    assert run.grad_norm() == 0
    train_step(run, 1)
    first = run.grad_norm()
    run.zero_grad()
    train_step(run, 1)
    assert run.grad_norm() == first


def test_an_adapter_goes_in_and_out_unchanged(client: Client) -> None:
    run = client.open_run(lora=[LayerLora(1, False, 3, 5, 2, 1.0, 1.0, 1.0)], wire_dtype="fp32", seed=3)
    initial = run.get_adapter()
    assert {key.tensor: tuple(value.shape) for key, value in initial.items()} == {
        "a_gate": (8, 3, 32),
        "b_gate": (8, 24, 3),
        "a_up": (8, 5, 32),
        "b_up": (8, 24, 5),
        "a_down": (8, 2, 24),
        "b_down": (8, 32, 2),
    }
    assert not any(initial[key].any() for key in initial if key.tensor.startswith("b"))
    assert initial[TensorKey(1, "a_up")].abs().max() <= 32**-0.5
    values = {key: torch.randn_like(value) for key, value in initial.items()}
    run.put_adapter(values)
    assert all(torch.equal(value, run.get_adapter()[key]) for key, value in values.items())


def test_a_forward_without_the_adapter_is_the_base_model(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    x, ids, weights = batch(6, 0)
    base = run.submit_forward(0, x, ids, weights, save_for_backward=False).result()
    with_random_b(run)
    adapted = run.submit_forward(0, x, ids, weights, save_for_backward=False).result()
    disabled = run.submit_forward(0, x, ids, weights, save_for_backward=False, adapters=()).result()
    assert torch.equal(base, disabled)
    assert not torch.allclose(base, adapted)


def test_an_adapter_that_changed_invalidates_its_tickets(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    x, ids, weights = batch(6, 0)
    handle = run.submit_forward(0, x, ids, weights)
    output = handle.result()
    run.put_adapter(run.get_adapter())
    with pytest.raises(kt.WrongPhase, match="an adapter changed since the forward"):
        run.submit_backward(0, handle.ticket, output).result()


UPDATES = [AdamW(1e-2), Adam(1e-2, weight_decay=0.1), Sgd(1e-2, momentum=0.9), Adafactor(1e-2)]


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("update", UPDATES, ids=lambda update: type(update).__name__)
def test_every_optimizer_survives_a_checkpoint(client: Client, update: Update, moments: str) -> None:
    options, name = RunOptions(moments=moments), f"{type(update).__name__}-{moments}"
    run = client.open_run(lora=LORA, wire_dtype="fp32", seed=2, options=options)
    with_random_b(run)
    train_step(run, 0)
    before = run.get_adapter()
    run.step(update)
    moved = run.get_adapter()
    assert not any(torch.equal(moved[key], before[key]) for key in before)
    run.save_checkpoint(name)
    train_step(run, 1)
    run.step(update)
    resumed = client.open_run(lora=LORA, wire_dtype="fp32", seed=9, options=options)
    resumed.load_checkpoint(name)
    train_step(resumed, 1)
    resumed.step(update)
    expected, got = (each.get_adapter(moments=True) for each in (run, resumed))
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_another_kind_of_optimizer_needs_a_new_start(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    train_step(run, 0)
    run.step(AdamW(1e-2))
    train_step(run, 1)
    with pytest.raises(kt.WrongPhase, match=r"has taken steps with adamw .* and is asked for sgd"):
        run.step(Sgd(1e-2))
    assert {key.part for key in run.get_adapter(parameters=False, moments=True)} == {"exp_avg", "exp_avg_sq", "step"}
    run.step(Adam(1e-2))  # of the same kind of state
    train_step(run, 2)
    assert run.step(Sgd(1e-2), new_optimizer=True) == 3
    assert {key.part for key in run.get_adapter(parameters=False, moments=True)} == {"momentum_buffer", "step"}


def test_moments_count_their_updates_layer_by_layer(client: Client) -> None:
    """A layer that saw no backward keeps its count, and moments put without one stand for the run's steps."""
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    layers = [entry.layer for entry in LORA]

    def counts() -> dict[int, float]:
        moments = run.get_adapter(parameters=False, moments=True)
        return {key.layer: value.item() for key, value in moments.items() if key.part == "step"}

    with_random_b(run)
    train_step(run, 0)
    run.step(AdamW(1e-2))
    x, ids, weights = batch(5, 2)
    handle = run.submit_forward(layers[0], x, ids, weights)
    run.submit_backward(layers[0], handle.ticket, handle.result()).result()
    run.step(AdamW(1e-2))
    assert counts() == {layers[0]: 2.0} | dict.fromkeys(layers[1:], 1.0)
    moments = run.get_adapter(parameters=False, moments=True)
    run.put_adapter({key: value for key, value in moments.items() if key.part != "step"}, step=7)
    assert counts() == dict.fromkeys(layers, 7.0)
    run.put_adapter(dict(reversed(moments.items())), step=2)
    assert counts() == {layers[0]: 2.0} | dict.fromkeys(layers[1:], 1.0)
    bad = next(key for key in moments if key.part == "step")
    for value in (-1.0, 0.5, float("nan"), 2.0**30):
        with pytest.raises(kt.InvalidRequest, match=r"expected a whole number|not finite"):
            run.put_adapter({bad: torch.full((1, 1, 1), value)}, step=2)
    fresh = client.open_run(lora=LORA, wire_dtype="fp32")
    with pytest.raises(kt.InvalidRequest, match="came before the moments it counts"):
        fresh.put_adapter({bad: torch.ones(1, 1, 1)}, step=1)


def test_a_refused_upload_of_moments_changes_nothing(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    train_step(run, 0)
    run.step(AdamW(1e-2))
    before = run.get_adapter(parameters=False, moments=True)
    key = next(iter(before))
    for value in (torch.zeros(1, 2, 3), torch.full(before[key].shape, torch.nan)):
        with pytest.raises(kt.InvalidRequest, match=r"expected|not finite"):
            run.put_adapter({key._replace(part="momentum_buffer"): value}, step=5)
    after = run.get_adapter(parameters=False, moments=True)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[each], before[each]) for each in before)
    train_step(run, 1)
    assert run.step(AdamW(1e-2)) == 2


def test_a_refused_step_changes_no_layer(client: Client) -> None:
    """Not the layers either that come before the one it is refused for."""
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    x, ids, weights = batch(5, 2)
    handle = run.submit_forward(LORA[-1].layer, x, ids, weights)
    run.submit_backward(LORA[-1].layer, handle.ticket, handle.result()).result()
    run.step(AdamW(1e-2))
    train_step(run, 1)
    with pytest.raises(kt.WrongPhase, match="is asked for sgd"):
        run.step(Sgd(1e-2, momentum=0.9))
    assert {key.layer for key in run.get_adapter(parameters=False, moments=True)} == {LORA[-1].layer}


def test_a_new_optimizer_forgets_moments_without_an_update_too(client: Client) -> None:
    runs = [client.open_run(lora=LORA, wire_dtype="fp32", seed=4) for _ in range(2)]
    shapes = {key._replace(part="exp_avg"): value.shape for key, value in runs[0].get_adapter().items()}
    runs[0].put_adapter({key: torch.ones(shape) for key, shape in shapes.items()})
    for run in runs:
        with_random_b(run)
        train_step(run, 0)
        run.step(AdamW(1e-2), new_optimizer=True)
    got, expected = (run.get_adapter(moments=True) for run in runs)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_a_new_optimizer_is_new_for_layers_without_a_gradient_too(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    train_step(run, 0)
    run.step(AdamW(1e-2))
    x, ids, weights = batch(5, 2)
    handle = run.submit_forward(LORA[0].layer, x, ids, weights)
    run.submit_backward(LORA[0].layer, handle.ticket, handle.result()).result()
    run.step(Sgd(1e-2, momentum=0.9), new_optimizer=True)
    moments = run.get_adapter(parameters=False, moments=True)
    assert {(key.layer, key.part) for key in moments} == {(LORA[0].layer, "momentum_buffer"), (LORA[0].layer, "step")}
    train_step(run, 3)
    assert run.step(Sgd(1e-2, momentum=0.9)) == 3


def test_groups_of_a_step_have_their_own_numbers(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    with_random_b(run)
    train_step(run, 0)
    before = run.get_adapter()
    b_tensors = ("b_gate", "b_up", "b_down")
    run.step([ParamGroup(Sgd(0.0)), ParamGroup(Sgd(1.0), b_tensors)])
    for key, value in run.get_adapter().items():
        assert torch.equal(value, before[key]) == (key.tensor not in b_tensors)


def test_dropout_is_replayed_by_its_seed(client: Client) -> None:
    lora = [dataclasses.replace(entry, dropout=0.4) for entry in LORA]
    run = client.open_run(lora=lora, wire_dtype="fp32", seed=3)
    with_random_b(run)
    x, ids, weights = batch(30, 1)
    seeds = (7, 7, 8, 0)
    first, again, other, off = (run.submit_forward(0, x, ids, weights, dropout_seed=seed).result() for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, off)
    with pytest.raises(kt.InvalidRequest, match="dropout_seed is -1"):
        run.submit_forward(0, x, ids, weights, dropout_seed=-1)
    with pytest.raises(kt.InvalidRequest, match=r"LoRA dropout is 1.0+, expected a probability"):
        client.open_run(lora=[dataclasses.replace(LORA[0], dropout=1.0)])


def test_tickets_of_inputs_give_the_same_bits_for_less(client: Client) -> None:
    results, sizes = [], []
    for tickets in ("activations", "inputs"):
        run = client.open_run(lora=LORA, wire_dtype="fp32", seed=3, options=RunOptions(tickets=tickets))
        with_random_b(run)
        x, ids, weights = batch(40, 1)
        handle = run.submit_forward(0, x, ids, weights)
        output = handle.result()
        status = next(each for each in client.status().runs if each.run == run.name)
        sizes.append(status.members[0].ticket_bytes)
        results.append([output, *run.submit_backward(0, handle.ticket, output).result(), torch.tensor(run.grad_norm())])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert sizes[1] < sizes[0] / 2


def test_checkpoints_continue_bit_for_bit(client: Client) -> None:
    run = client.open_run("to-save", lora=LORA, wire_dtype="fp32", seed=2, ephemeral=True)
    with_random_b(run)
    for step in range(2):
        train_step(run, step)
        run.step(AdamW(1e-2))
    run.save_checkpoint("two-steps")
    with pytest.raises(kt.AlreadyExists, match="checkpoints never change"):
        run.save_checkpoint("two-steps")
    for step in range(2, 4):
        train_step(run, step)
        run.step(AdamW(1e-2))
    resumed = client.open_run(lora=LORA, wire_dtype="fp32", seed=9)
    resumed.load_checkpoint("two-steps")
    assert resumed.steps_taken == 2
    for step in range(2, 4):
        train_step(resumed, step)
        resumed.step(AdamW(1e-2))
    for moments in (False, True):
        expected = run.get_adapter(parameters=not moments, moments=moments)
        got = resumed.get_adapter(parameters=not moments, moments=moments)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    dropping = client.open_run(lora=[dataclasses.replace(entry, dropout=0.5) for entry in LORA], wire_dtype="fp32")
    dropping.load_checkpoint("two-steps")  # dropout is no part of what was saved
    assert dropping.steps_taken == 2
    other = client.open_run(lora=LORA[:1], wire_dtype="fp32")
    with pytest.raises(kt.InvalidRequest, match="other LoRA shapes"):
        other.load_checkpoint("two-steps")
    with pytest.raises(kt.NotFound, match=r"there are: .*two-steps"):
        other.load_checkpoint("none")
    with pytest.raises(kt.InvalidRequest, match="not allowed"):
        other.save_checkpoint("../outside")


def test_a_checkpoint_from_before_the_first_step_has_no_moments(client: Client) -> None:
    run = client.open_run(lora=LORA, wire_dtype="fp32", seed=4)
    with_random_b(run)
    run.save_checkpoint("untrained")
    run.save_checkpoint("untrained.partial")
    train_step(run, 0)
    run.step(AdamW(1e-2))
    expected = run.get_adapter()
    run.load_checkpoint("untrained")
    train_step(run, 0)
    assert run.step(AdamW(1e-2)) == 1
    got = run.get_adapter()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    run.load_checkpoint("untrained.partial")  # an ordinary name, untouched by later saves


def test_a_rank_that_leaves_fails_the_step_of_the_others(client: Client) -> None:
    members = [
        client.open_run("leaving", lora=LORA, rank=rank, world_size=2, wire_dtype="fp32", ephemeral=True) for rank in range(2)
    ]
    before = members[0].get_adapter()
    for member in members:
        train_step(member, 1)
    with pytest.raises(kt.DeadlineExceeded, match=r"ranks \[1\]"):
        members[0].step(AdamW(1e-2), timeout_s=0.2)
    members[0].leave()
    with pytest.raises(kt.DeadlineExceeded, match=r"for ranks \[0\] of 2"):
        members[1].step(AdamW(1e-2), timeout_s=0.2)
    after = client.open_run("leaving", lora=LORA, rank=0, world_size=2, wire_dtype="fp32").get_adapter()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_another_configuration_under_one_name_is_refused(client: Client) -> None:
    client.open_run("named", lora=LORA, ephemeral=True)
    with pytest.raises(kt.AlreadyExists, match="another configuration"):
        client.open_run("named", lora=LORA[:1])


def test_too_large_a_run_is_refused_with_its_numbers(client: Client) -> None:
    wide = [LayerLora(layer, False, 4096, 4096, 4096, 1.0, 1.0, 1.0) for layer in range(LAYERS)]
    with pytest.raises(kt.OutOfCapacity, match=r"needs .* of the limit of"):
        client.open_run("wide", lora=wide, world_size=1024, ephemeral=True)


def test_leaving_frees_everything(server: ServerProcess) -> None:
    kinds = ("adapters", "gradients", "optimizer", "tickets", "kept", "outcomes", "requests", "scratch")

    def reserved() -> list[float]:
        return [server.metric(f'kt_expert_memory_bytes{{kind="{kind}"}}') for kind in kinds]

    before = reserved()
    with kt.connect(server.address) as client:
        run = client.open_run(lora=LORA)
        x, ids, weights = batch(6, 0)
        run.submit_forward(0, x, ids, weights).result()
        assert reserved() != before
    assert reserved() == before


def test_memory_of_past_tickets_is_kept_until_a_member_leaves(server: ServerProcess) -> None:
    with kt.connect(server.address) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32")
        x, ids, weights = batch(16_000, 0)  # its tokens take more than the 1 MiB below which nothing is kept
        handle = run.submit_forward(0, x, ids, weights)
        run.submit_backward(0, handle.ticket, handle.result()).result()
        wait_until(lambda: server.metric('kt_expert_memory_bytes{kind="kept"}') > 2**20, what="the ticket's end")
    assert server.metric('kt_expert_memory_bytes{kind="kept"}') == 0


FORKING_TRAINER = """
import os, sys
sys.path.insert(0, sys.argv[2])
import kt_expert_client as kt
from support.batches import LORA, train_step

with kt.connect(sys.argv[1]) as client:
    run = client.open_run(lora=LORA, wire_dtype="fp32")
    train_step(run, 0)
    child = os.fork()
    if not child:
        try:
            run.grad_norm()
        except kt.WrongPhase as error:
            print(error, flush=True)
        run.leave()
        client.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert run.grad_norm() > 0
"""


def test_a_forked_child_is_refused_and_harms_nothing(server: ServerProcess) -> None:
    """As a data loader's worker is one."""
    tests = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", FORKING_TRAINER, server.address, tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "was opened by process" in done.stdout


def test_no_server_is_a_clear_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(kt.ServerUnavailable, match=f"nothing listens at {address}"):
            kt.connect(address, timeout_s=0.5)
