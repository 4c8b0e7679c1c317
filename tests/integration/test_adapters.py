"""Several adapters on one run: made, added up, trained apart, copied, changed and removed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import ActiveAdapter, AdamW, Client, GradientTarget, LayerLora, Run, Sgd, TensorKey, TensorSet
from kt_expert_proto.lora import LORA_TENSORS, tensor_bits
from kt_expert_proto.v1 import session_pb2 as spb
from support.batches import EXPERTS, HIDDEN, LAYERS, batch
from support.server import ServerProcess

INTER = 24  # of the tiny qwen3_moe
LAYER = 1
TIED = LayerLora(LAYER, True, 4, 4, 2, 2.0, 2.0, 0.5)
SPLIT = LayerLora(LAYER, False, 3, 2, 5, 0.5, 1.5, 1.0)
_NAMES = itertools.count(1)


def shape_of(lora: LayerLora, tensor: str) -> tuple[int, int, int]:
    rank = getattr(lora, "rank_" + tensor.split("_")[1])
    inner = {"a_gate": HIDDEN, "a_up": HIDDEN, "a_down": INTER, "b_gate": INTER, "b_up": INTER, "b_down": HIDDEN}[tensor]
    return (EXPERTS, rank, inner) if tensor.startswith("a_") else (EXPERTS, inner, rank)


def random_tensors(lora: LayerLora, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape_of(lora, name), generator=generator) * 0.3 for name in lora.tensors}


def make(run: Run, name: str, lora: LayerLora, seed: int) -> dict[str, torch.Tensor]:
    values = random_tensors(lora, seed)
    assert run.adapters.create(name, [lora])
    for tensor, value in values.items():
        run.adapters.write(TensorKey(lora.layer, tensor, adapter=name), value)
    return values


def forward(run: Run, *adapters: str | ActiveAdapter, seed: int = 0) -> tuple[torch.Tensor, int]:
    active = [each if isinstance(each, ActiveAdapter) else ActiveAdapter(each) for each in adapters]
    handle = run.submit_forward(LAYER, *batch(12, seed), adapters=active)
    return handle.result(), handle.ticket


def backward(run: Run, ticket: int, *targets: GradientTarget, keep: bool = False) -> torch.Tensor:
    dy = torch.cos(batch(12, 7)[0])
    return run.submit_backward(LAYER, ticket, dy, targets=targets, keep_ticket=keep).result()[0]


def wants(name: str, lora: LayerLora, *tensors: str, **more: int) -> GradientTarget:
    return GradientTarget(name, tensor_bits(tensors or lora.tensors), **more)


def gradient(run: Run, name: str, lora: LayerLora, tensor: str) -> torch.Tensor:
    return run.adapters.read(TensorKey(LAYER, tensor, "gradient", name), shape_of(lora, tensor))


def parameter(run: Run, name: str, lora: LayerLora, tensor: str) -> torch.Tensor:
    return run.adapters.read(TensorKey(LAYER, tensor, adapter=name), shape_of(lora, tensor))


@pytest.fixture
def run(server: ServerProcess) -> Iterator[Run]:
    with kt.connect(server.address) as client:
        yield client.open_run(f"adapters-{next(_NAMES)}", wire_dtype="fp32", ephemeral=True)


def joined(parts: list[tuple[LayerLora, dict[str, torch.Tensor]]]) -> tuple[LayerLora, dict[str, torch.Tensor]]:
    """One adapter that does what these do together."""
    ranks = [sum(getattr(each, rank) for each, _ in parts) for rank in ("rank_gate", "rank_up", "rank_down")]
    lora = LayerLora(LAYER, False, *ranks, 1.0, 1.0, 1.0)
    values = {}
    for name in LORA_TENSORS:
        pieces = []
        for each, tensors in parts:
            source = "a_gate" if name == "a_up" and each.tied else name
            scale = getattr(each, "scale_" + name.split("_")[1])
            pieces.append(tensors[source] if name.startswith("a_") else tensors[source] * scale)
        values[name] = torch.cat(pieces, dim=1 if name.startswith("a_") else 2)
    return lora, values


@pytest.mark.parametrize("second", [SPLIT, replace(TIED, rank_gate=2, rank_up=2, scale_gate=1.0, scale_up=1.0)])
def test_adapters_that_are_active_together_add_up(run: Run, second: LayerLora) -> None:
    parts = [(TIED, make(run, "one", TIED, 1)), (second, make(run, "two", second, 2))]
    lora, values = joined(parts)
    assert run.adapters.create("both", [lora])
    for tensor, value in values.items():
        run.adapters.write(TensorKey(LAYER, tensor, adapter="both"), value)
    base, _ = forward(run)
    expected, whole = forward(run, "both")
    got, ticket = forward(run, "one", "two")
    assert not torch.allclose(base, expected, rtol=0.05)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)
    dx = backward(run, ticket, wants("one", TIED), wants("two", second))
    assert torch.allclose(dx, backward(run, whole, wants("both", lora)), rtol=1e-4, atol=1e-5)
    first = {"one": 0, "two": 1}
    for (name, index), tensor in itertools.product(first.items(), LORA_TENSORS):
        each = parts[index][0]
        if tensor not in each.tensors:
            continue
        places = [tensor, "a_up"] if tensor == "a_gate" and each.tied else [tensor]
        total = torch.zeros(shape_of(each, tensor))
        for place in places:
            rank = "rank_" + place.split("_")[1]
            begin = sum(getattr(other, rank) for other, _ in parts[:index])
            piece = gradient(run, "both", lora, place).narrow(1 if place.startswith("a_") else 2, begin, getattr(each, rank))
            total += piece if place.startswith("a_") else piece * getattr(each, "scale_" + place.split("_")[1])
        assert torch.allclose(gradient(run, name, each, tensor), total, rtol=1e-4, atol=1e-6)


def test_a_request_has_scales_of_its_own(run: Run) -> None:
    make(run, "one", TIED, 1)
    other = replace(TIED, scale_gate=0.25, scale_up=0.25, scale_down=3.0)
    make(run, "two", other, 1)
    expected, whole = forward(run, "two")
    got, ticket = forward(run, ActiveAdapter("one", 0.25, 0.25, 3.0))
    assert torch.equal(got, expected)
    assert torch.equal(backward(run, ticket, wants("one", TIED)), backward(run, whole, wants("two", other)))
    assert torch.equal(gradient(run, "one", TIED, "b_up"), gradient(run, "two", other, "b_up"))
    with pytest.raises(kt.InvalidRequest, match="tied LoRA needs one rank and one scale"):
        forward(run, ActiveAdapter("one", 1.0, 2.0))
    with pytest.raises(kt.InvalidRequest, match="names an adapter twice"):
        forward(run, "one", "one")


def test_only_what_is_wanted_is_added_to(run: Run) -> None:
    make(run, "one", SPLIT, 1)
    backward(run, forward(run, "one")[1], wants("one", SPLIT, "a_gate", "b_down"))
    once = gradient(run, "one", SPLIT, "a_gate")
    with pytest.raises(kt.NotFound, match="no backward has added to it"):
        gradient(run, "one", SPLIT, "a_up")
    again = wants("one", SPLIT, "a_gate", "b_down", replaced=tensor_bits(["b_down"]))
    before = gradient(run, "one", SPLIT, "b_down")
    backward(run, forward(run, "one")[1], again)
    assert torch.allclose(gradient(run, "one", SPLIT, "a_gate"), 2 * once)
    assert torch.equal(gradient(run, "one", SPLIT, "b_down"), before)
    total, norms = run.adapters.norms([TensorSet("one", tensor_bits(["a_gate", "b_down"]), (LAYER,))])
    expected = [float((2 * once).norm()), float(before.norm())]
    assert norms == pytest.approx(expected, rel=1e-5)
    assert total == pytest.approx(math.hypot(*expected), rel=1e-5)
    with pytest.raises(kt.WrongPhase, match="a_up of adapter 'one' in layer 1 have no gradients"):
        run.adapters.norms([TensorSet("one", tensor_bits(["a_up"]), (LAYER,))])
    with pytest.raises(kt.InvalidRequest, match="can give 0x3f of it"):
        backward(run, forward(run, "one")[1], GradientTarget("one", 1 << 6))
    with pytest.raises(kt.InvalidRequest, match="can give 0x0 of it"):
        backward(run, forward(run)[1], wants("one", SPLIT))


def test_a_ticket_that_is_kept_serves_two_backwards(run: Run) -> None:
    make(run, "one", SPLIT, 1)
    _, ticket = forward(run, "one")
    first = backward(run, ticket, wants("one", SPLIT), keep=True)
    once = gradient(run, "one", SPLIT, "a_down")
    assert torch.equal(backward(run, ticket, wants("one", SPLIT)), first)
    assert torch.allclose(gradient(run, "one", SPLIT, "a_down"), 2 * once)
    with pytest.raises(kt.WrongPhase, match="was already consumed"):
        backward(run, ticket, wants("one", SPLIT))


def step(run: Run, *sets: TensorSet, rate: float = 1.0, scale: float = 1.0, kept: tuple[TensorSet, ...] = ()) -> None:
    group = Sgd(rate).group()
    group.sets.extend(each.to_proto() for each in sets)
    group.grad_scale = scale
    run.take_step([group], kept)


def test_a_step_ends_the_gradients_it_does_not_keep(run: Run) -> None:
    make(run, "one", SPLIT, 1)
    backward(run, forward(run, "one")[1], wants("one", SPLIT))
    a, b = (TensorSet("one", tensor_bits([name]), (LAYER,)) for name in ("a_gate", "b_gate"))
    old, before = gradient(run, "one", SPLIT, "a_gate"), parameter(run, "one", SPLIT, "a_gate")
    kept = gradient(run, "one", SPLIT, "b_gate")
    step(run, a, rate=0.5, kept=(b,))
    assert torch.allclose(parameter(run, "one", SPLIT, "a_gate"), before - 0.5 * old)
    assert torch.equal(gradient(run, "one", SPLIT, "a_gate"), old)  # as in torch, until it is cleared
    backward(run, forward(run, "one")[1], wants("one", SPLIT, "a_gate", "b_gate"))
    fresh = gradient(run, "one", SPLIT, "a_gate")
    assert not torch.allclose(fresh, old)
    grown = gradient(run, "one", SPLIT, "b_gate")
    run.zero_grad()
    backward(run, forward(run, "one")[1], wants("one", SPLIT, "a_gate", "b_gate"))
    assert torch.allclose(grown, kept + gradient(run, "one", SPLIT, "b_gate"), rtol=1e-4, atol=1e-6)
    step(run, a, b)
    more = wants("one", SPLIT, "a_gate", continued=tensor_bits(["a_gate"]))
    backward(run, forward(run, "one")[1], more)
    last = gradient(run, "one", SPLIT, "a_gate")
    run.zero_grad("one")
    backward(run, forward(run, "one")[1], wants("one", SPLIT, "a_gate"))
    assert torch.allclose(last, fresh + gradient(run, "one", SPLIT, "a_gate"), rtol=1e-4, atol=1e-6)
    run.zero_grad()
    with pytest.raises(kt.WrongPhase, match="clear the gradients first"):
        backward(run, forward(run, "one")[1], more)


def test_gradients_are_changed_in_place(run: Run) -> None:
    make(run, "one", SPLIT, 1)
    backward(run, forward(run, "one")[1], wants("one", SPLIT, "a_gate", "b_gate", "a_up"))
    before = {name: gradient(run, "one", SPLIT, name) for name in ("a_gate", "b_gate", "a_up")}
    sets = [TensorSet("one", tensor_bits([name]), (LAYER,)).to_proto() for name in ("a_gate", "b_gate", "a_up", "b_down")]
    run.adapters.edit([
        spb.GradientEdit(sets=sets[:2], scale=0.5),
        spb.GradientEdit(sets=sets[1:2], clamp=spb.Clamp(least=-0.01, most=0.02)),
        spb.GradientEdit(sets=sets[2:4], zero=True),
    ])  # fmt: skip
    assert torch.equal(gradient(run, "one", SPLIT, "a_gate"), before["a_gate"] * 0.5)
    assert torch.equal(gradient(run, "one", SPLIT, "b_gate"), (before["b_gate"] * 0.5).clamp(-0.01, 0.02))
    assert not gradient(run, "one", SPLIT, "a_up").any()
    assert not gradient(run, "one", SPLIT, "b_down").any()  # which had none: from here on it counts
    with pytest.raises(kt.InvalidRequest, match="neither by what to scale, nor where to clamp"):
        run.adapters.edit([spb.GradientEdit(sets=sets)])
    written = torch.randn(shape_of(SPLIT, "a_up"))
    run.adapters.write(TensorKey(LAYER, "a_up", "gradient", "one"), written)
    assert torch.equal(gradient(run, "one", SPLIT, "a_up"), written)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.5, 0.0, math.inf, -math.inf])
def test_norms_of_every_order_are_torchs(run: Run, order: float) -> None:
    make(run, "one", SPLIT, 1)
    make(run, "two", TIED, 2)
    backward(run, forward(run, "one", "two")[1], wants("one", SPLIT), wants("two", TIED))
    sets = [TensorSet("one", 0, (LAYER,)), TensorSet("two", tensor_bits(["b_up"]), (LAYER,))]
    total, norms = run.adapters.norms(sets, order)
    tensors = [gradient(run, "one", SPLIT, name) for name in SPLIT.tensors] + [gradient(run, "two", TIED, "b_up")]
    expected = [float(torch.linalg.vector_norm(each, order)) for each in tensors]
    assert norms == pytest.approx(expected, rel=1e-5)
    flat = torch.cat([each.reshape(-1) for each in tensors])
    assert total == pytest.approx(float(torch.linalg.vector_norm(flat, order)), rel=1e-5)


def test_training_one_adapter_leaves_the_others_alone(run: Run) -> None:
    make(run, "one", TIED, 1)
    make(run, "two", SPLIT, 2)
    before, held = forward(run, "two")
    backward(run, forward(run, "one")[1], wants("one", TIED))
    step(run, TensorSet("one"))
    assert torch.equal(forward(run, "two")[0], before)
    backward(run, held, wants("two", SPLIT))  # a ticket of the other adapter is as good as it was
    _, stale = forward(run, "one")
    backward(run, forward(run, "one")[1], wants("one", TIED))
    step(run, TensorSet("one"))
    with pytest.raises(kt.WrongPhase, match="an adapter changed since"):
        backward(run, stale, wants("one", TIED))


def test_a_copy_is_independent(run: Run) -> None:
    values = make(run, "one", TIED, 1)
    run.adapters.copy("one", "snapshot")
    backward(run, forward(run, "one")[1], wants("one", TIED))
    step(run, TensorSet("one"))
    for name, value in values.items():
        assert torch.equal(parameter(run, "snapshot", TIED, name), value)
        assert not torch.equal(parameter(run, "one", TIED, name), value)
    backward(run, forward(run, "snapshot")[1], wants("snapshot", TIED))
    step(run, TensorSet("snapshot"), rate=0.1)
    assert not torch.equal(parameter(run, "snapshot", TIED, "b_up"), values["b_up"])
    moved = parameter(run, "snapshot", TIED, "b_up")
    run.adapters.copy("one", "snapshot")  # as another rank does
    assert torch.equal(parameter(run, "snapshot", TIED, "b_up"), moved)
    with pytest.raises(kt.NotFound, match="no adapter 'absent'; it has: one, snapshot"):
        run.adapters.copy("absent", "other")


def test_an_adapter_that_was_deleted_is_gone_with_its_tickets(run: Run, server: ServerProcess) -> None:
    make(run, "one", TIED, 1)
    _, ticket = forward(run, "one")
    backward(run, forward(run, "one")[1], wants("one", TIED))
    run.adapters.delete("one")
    with kt.connect(server.address) as client:
        status = next(each for each in client.status().runs if each.run == run.name)
    assert (status.adapter_bytes, status.optimizer) == (0, "")
    with pytest.raises(kt.WrongPhase, match="an adapter changed since"):
        backward(run, ticket, wants("one", TIED))
    with pytest.raises(kt.NotFound, match="no adapter 'one'; it has: none"):
        forward(run, "one")
    run.adapters.delete("one")  # as another rank does
    make(run, "one", TIED, 2)
    with pytest.raises(kt.WrongPhase, match="an adapter changed since"):  # of the first one of that name
        backward(run, ticket, wants("one", TIED))


def test_projections_and_layers_are_added(run: Run) -> None:
    """PEFT wraps one parameter after another."""
    down = LayerLora(LAYER, rank_down=2, scale_down=0.5)
    gate_up = replace(TIED, rank_down=0, scale_down=0.0)
    values = make(run, "one", down, 1)
    assert run.adapters.create("one", [gate_up])
    assert torch.equal(parameter(run, "one", TIED, "a_down"), values["a_down"])
    assert not parameter(run, "one", TIED, "a_gate").any()
    assert not run.adapters.create("one", [down])
    assert not run.adapters.create("one", [TIED])
    assert run.adapters.create("one", [replace(TIED, layer=0)])
    with pytest.raises(kt.AlreadyExists, match="choose another name for the adapter"):
        run.adapters.create("one", [replace(down, rank_down=3)])
    make(run, "two", down, 3)
    backward(run, forward(run, "two")[1], wants("two", down))
    with pytest.raises(kt.WrongPhase, match="is being trained"):
        run.adapters.create("two", [gate_up])
    with pytest.raises(kt.InvalidRequest, match="adapter name"):
        run.adapters.create("../two", [gate_up])
    with pytest.raises(kt.InvalidRequest, match="give one of the two"):
        run.adapters.create("three", [])


def test_groups_have_rates_and_scales_of_their_own(run: Run) -> None:
    loras = [replace(SPLIT, layer=layer) for layer in range(LAYERS)]
    run.adapters.create("one", loras, initialise=True)
    for layer in range(LAYERS):
        handle = run.submit_forward(layer, *batch(12, layer), adapters=[ActiveAdapter("one")])
        output = handle.result()
        run.submit_backward(layer, handle.ticket, torch.cos(output), targets=[wants("one", SPLIT)]).result()
    keys = [TensorKey(layer, "b_up", adapter="one") for layer in range(LAYERS)]
    shape = shape_of(SPLIT, "b_up")
    gradients = [run.adapters.read(key._replace(part="gradient"), shape) for key in keys]
    groups = []
    for rate, scale, layers in ((1.0, 0.5, (0,)), (2.0, -1.0, (1,))):
        group = Sgd(rate).group()
        group.sets.append(TensorSet("one", tensor_bits(["b_up"]), layers).to_proto())
        group.grad_scale = scale
        groups.append(group)
    run.take_step(groups)
    got = [run.adapters.read(key, shape) for key in keys]
    assert torch.allclose(got[0], -0.5 * gradients[0])
    assert torch.allclose(got[1], 2.0 * gradients[1])
    assert not got[2].any()


def test_a_checkpoint_holds_every_adapter(run: Run) -> None:
    values = {"one": make(run, "one", TIED, 1), "two": make(run, "two", SPLIT, 2)}
    loras = {"one": TIED, "two": SPLIT}
    backward(run, forward(run, "one")[1], wants("one", TIED))
    adamw = AdamW(0.1).group()
    adamw.sets.append(TensorSet("one").to_proto())
    adamw.grad_scale = 1.0
    run.take_step([adamw])
    moved = {name: parameter(run, "one", TIED, name) for name in TIED.tensors}
    run.save_checkpoint(f"{run.name}-both")
    for name, lora in loras.items():
        for tensor in lora.tensors:
            run.adapters.write(TensorKey(LAYER, tensor, adapter=name), torch.zeros(shape_of(lora, tensor)))
    run.load_checkpoint(f"{run.name}-both")
    assert all(torch.equal(parameter(run, "one", TIED, name), value) for name, value in moved.items())
    assert all(torch.equal(parameter(run, "two", SPLIT, name), value) for name, value in values["two"].items())
    assert {key.adapter for key in run.get_adapter(parameters=False, moments=True)} == {"one"}
    run.adapters.delete("two")
    with pytest.raises(kt.InvalidRequest, match=r"has an adapter .two.* make one of that name first"):
        run.load_checkpoint(f"{run.name}-both")


def test_a_server_that_starts_again_brings_all_adapters_back(qwen3_checkpoint: Path, tmp_path: Path) -> None:
    state = ["--state-dir", str(tmp_path / "state"), "--checkpoint-every", "1"]
    with ServerProcess(qwen3_checkpoint, tmp_path / "first.log", *state) as first, kt.connect(first.address) as client:
        run = client.open_run("mine", wire_dtype="fp32")
        make(run, "one", TIED, 1)
        backward(run, forward(run, "one")[1], wants("one", TIED))
        step(run, TensorSet("one"))
        run.adapters.copy("one", "two")
        expected = forward(run, "two")[0]
        run.leave()
    with ServerProcess(qwen3_checkpoint, tmp_path / "second.log", *state) as second, kt.connect(second.address) as client:
        again = client.open_run("mine", wire_dtype="fp32")
        assert torch.equal(forward(again, "two")[0], expected)
        assert not again.adapters.create("two", [TIED])


def test_memory_that_is_not_there_is_refused_by_its_kind(client_of_small: Client) -> None:
    run = client_of_small.open_run("small", wire_dtype="fp32", ephemeral=True)
    wide = [LayerLora(layer, False, 4096, 4096, 4096, 1.0, 1.0, 1.0) for layer in range(LAYERS)]
    with pytest.raises(kt.OutOfCapacity, match=r"the .* of adapter .wide."):
        run.adapters.create("wide", wide, trainable=True)
    assert not client_of_small.status().runs[0].adapter_bytes
    make(run, "one", TIED, 1)
    backward(run, forward(run, "one")[1], wants("one", TIED))


@pytest.fixture
def client_of_small(qwen3_checkpoint: Path, tmp_path: Path) -> Iterator[Client]:
    limited = ServerProcess(qwen3_checkpoint, tmp_path / "log", "--memory-limit", "0.45")
    with limited as server, kt.connect(server.address) as client:
        yield client
