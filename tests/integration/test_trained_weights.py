"""Expert weights that a run trains in full: read, trained, copied, written, kept, while the base model stays as it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from golden.reference import relative_error
from kt_expert_client import ActiveAdapter, AdamW, GradientTarget, LayerLora, Run, TensorKey, TensorSet
from kt_expert_client.optimizers import ParamGroup
from kt_expert_proto.lora import tensor_bits
from safetensors.torch import load_file
from support.batches import EXPERTS, HIDDEN, batch
from support.models import save_checkpoint
from support.server import ServerProcess

INTER, LAYER, WEIGHTS = 24, 1, "weights"
SHAPES = {"w_gate": (EXPERTS, INTER, HIDDEN), "w_up": (EXPERTS, INTER, HIDDEN), "w_down": (EXPERTS, HIDDEN, INTER)}
BITS = tensor_bits(SHAPES)
RATE = AdamW(0.02, weight_decay=0.1)
# Masters that differ in their last bit may round to two neighbours in bf16: of a few weights, by 2**-8.
FLIPPED = 2e-3
_NAMES = itertools.count(1)


@pytest.fixture
def run(server: ServerProcess) -> Iterator[Run]:
    with kt.connect(server.address) as client:
        yield client.open_run(f"weights-{next(_NAMES)}", wire_dtype="fp32", ephemeral=True)


def read(run: Run, tensor: str, part: str = "parameter", adapter: str = WEIGHTS) -> torch.Tensor:
    return run.adapters.read(TensorKey(LAYER, tensor, part, adapter), SHAPES[tensor])


def forward(run: Run, *adapters: str, seed: int = 3) -> tuple[torch.Tensor, int]:
    handle = run.submit_forward(LAYER, *batch(12, seed), adapters=[ActiveAdapter(name) for name in adapters])
    return handle.result(), handle.ticket


def backward(run: Run, ticket: int, *targets: GradientTarget) -> None:
    run.submit_backward(LAYER, ticket, torch.cos(batch(12, 7)[0]), targets=targets).result()


def rounded(values: torch.Tensor) -> torch.Tensor:
    """As passes use them; a gradient passes as if nothing had been rounded."""
    return values + (values.to(torch.bfloat16).float() - values).detach()


def layer(weights: dict[str, torch.Tensor], seed: int = 3) -> torch.Tensor:
    x, ids, routing = batch(12, seed)
    y = torch.zeros_like(x)
    for token, slot in itertools.product(range(ids.shape[0]), range(ids.shape[1])):
        gate, up, down = (rounded(weights[name][ids[token, slot]]) for name in ("w_gate", "w_up", "w_down"))
        hidden = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
        y[token] = y[token] + routing[token, slot] * (down @ hidden)
    return y


def test_base_weights_are_read_as_the_checkpoint_has_them(run: Run, tmp_path: Path) -> None:
    stored = load_file(save_checkpoint("qwen3_moe", tmp_path) / "model.safetensors")
    for name, shape in SHAPES.items():
        projection = name.removeprefix("w_")
        values = run.adapters.read(TensorKey(LAYER, name, "base"), shape)
        theirs = [stored[f"model.layers.{LAYER}.mlp.experts.{e}.{projection}_proj.weight"].float() for e in range(EXPERTS)]
        assert torch.equal(values, torch.stack(theirs))


def test_twenty_steps_are_those_of_torch_on_the_same_weights(run: Run) -> None:
    assert run.adapters.create(WEIGHTS, [LayerLora(LAYER, full=True)], trainable=True)
    ours = {name: torch.nn.Parameter(read(run, name)) for name in SHAPES}
    begun = {name: each.detach().clone() for name, each in ours.items()}
    optimizer = torch.optim.AdamW(ours.values(), lr=RATE.learning_rate, weight_decay=RATE.weight_decay)
    for step in range(20):
        output, ticket = forward(run, WEIGHTS, seed=step)
        expected = layer(ours, seed=step)
        assert relative_error(output, expected.detach()) < FLIPPED
        backward(run, ticket, GradientTarget(WEIGHTS, BITS))
        optimizer.zero_grad()
        expected.backward(torch.cos(batch(12, 7)[0]))  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        norms = run.adapters.norms([TensorSet(WEIGHTS, BITS, (LAYER,))])[1]
        assert norms == pytest.approx([float(each.grad.norm()) for each in ours.values()], rel=FLIPPED)  # type: ignore[union-attr]
        run.step([ParamGroup(RATE, tuple(SHAPES), WEIGHTS)])
        optimizer.step()
    for name, parameter in ours.items():
        assert relative_error(read(run, name) - begun[name], parameter.detach() - begun[name]) < 10 * FLIPPED


def test_the_base_model_and_other_runs_stay_as_they_are(run: Run, server: ServerProcess) -> None:
    before = forward(run)[0]
    run.adapters.create(WEIGHTS, [LayerLora(LAYER, full=True)])
    assert torch.equal(forward(run, WEIGHTS)[0], before)
    backward(run, forward(run, WEIGHTS)[1], GradientTarget(WEIGHTS, BITS))
    run.step([ParamGroup(RATE, (), WEIGHTS)])
    assert not torch.equal(forward(run, WEIGHTS)[0], before)
    assert torch.equal(forward(run)[0], before)
    with kt.connect(server.address) as client:
        other = client.open_run("neighbour", wire_dtype="fp32", ephemeral=True)
        assert torch.equal(forward(other)[0], before)


def test_a_forward_from_before_the_weights_were_the_runs_own_counts(run: Run) -> None:
    ticket = forward(run)[1]
    run.adapters.create(WEIGHTS, [LayerLora(LAYER, full=True)])
    backward(run, ticket, GradientTarget(WEIGHTS, BITS))
    early = read(run, "w_up", "gradient")
    backward(run, forward(run, WEIGHTS)[1], GradientTarget(WEIGHTS, BITS, replaced=BITS))
    assert torch.equal(read(run, "w_up", "gradient"), early)
    ticket = forward(run)[1]
    run.step([ParamGroup(RATE, (), WEIGHTS)])
    with pytest.raises(kt.InvalidRequest, match="can give 0x0"):
        backward(run, ticket, GradientTarget(WEIGHTS, BITS))


def test_lora_is_trained_on_weights_that_are_trained(run: Run) -> None:
    lora = LayerLora(LAYER, True, 4, 4, 4, 2.0, 2.0, 2.0)
    run.adapters.create(WEIGHTS, [LayerLora(LAYER, full=True)])
    run.adapters.create("lora", [lora], initialise=True)
    both = GradientTarget(WEIGHTS, BITS), GradientTarget("lora", tensor_bits(lora.tensors))
    backward(run, forward(run, "lora", WEIGHTS)[1], *both)
    alone = read(run, "w_down", "gradient")
    run.step([ParamGroup(RATE, (), WEIGHTS), ParamGroup(RATE, (), "lora")])
    assert float(alone.norm()) > 0
    moved = run.adapters.read(TensorKey(LAYER, "b_down", adapter="lora"), (EXPERTS, HIDDEN, 4))
    assert float(moved.norm()) > 0


def test_a_copy_is_independent_and_what_is_written_is_used(run: Run) -> None:
    run.adapters.create(WEIGHTS, [LayerLora(LAYER, full=True)])
    backward(run, forward(run, WEIGHTS)[1], GradientTarget(WEIGHTS, BITS))
    run.step([ParamGroup(RATE, (), WEIGHTS)])
    trained = forward(run, WEIGHTS)[0]
    run.adapters.copy(WEIGHTS, "copy")
    assert torch.equal(forward(run, "copy")[0], trained)
    run.adapters.write(TensorKey(LAYER, "w_down", adapter="copy"), torch.zeros(SHAPES["w_down"]))
    assert float(forward(run, "copy")[0].abs().max()) == 0.0
    assert torch.equal(forward(run, WEIGHTS)[0], trained)
    for name in SHAPES:
        run.adapters.write(TensorKey(LAYER, name, adapter="copy"), read(run, name))
    assert torch.equal(forward(run, "copy")[0], trained)
    run.adapters.delete("copy")
    with pytest.raises(kt.NotFound):
        forward(run, "copy")


def test_some_experts_of_a_tensor_are_read_and_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.adapters.create(WEIGHTS, [LayerLora(LAYER, full=True)])
    whole = read(run, "w_gate")
    monkeypatch.setattr("kt_expert_client.adapters._PIECE_BYTES", 3 * INTER * HIDDEN * 4)
    assert torch.equal(read(run, "w_gate"), whole)
    run.adapters.write(TensorKey(LAYER, "w_gate", adapter=WEIGHTS), whole * 2)
    assert torch.equal(read(run, "w_gate"), whole * 2)
    run.adapters.write(TensorKey(LAYER, "w_gate", "exp_avg", WEIGHTS), whole, step=5)
    assert torch.equal(read(run, "w_gate", "exp_avg"), whole)
    with pytest.raises(kt.InvalidRequest, match="there are 8 experts"):
        run.adapters.submit_read(TensorKey(LAYER, "w_gate", adapter=WEIGHTS), (2, INTER, HIDDEN), first_expert=7).wait()
    with pytest.raises(kt.InvalidRequest, match="cannot be written"):
        run.adapters.write(TensorKey(LAYER, "w_gate", "base"), whole)


def test_what_makes_no_sense_is_refused(run: Run) -> None:
    with pytest.raises(kt.InvalidRequest, match="in full or by LoRA"):
        run.adapters.create(WEIGHTS, [LayerLora(LAYER, rank_down=2, full=True)])
    run.adapters.create(WEIGHTS, [LayerLora(LAYER, full=True)])
    with pytest.raises(kt.AlreadyExists):
        run.adapters.create(WEIGHTS, [LayerLora(LAYER, rank_down=2)])
    run.adapters.create("more", [LayerLora(LAYER, full=True)])
    with pytest.raises(kt.InvalidRequest, match="takes those of one"):
        forward(run, WEIGHTS, "more")
    with pytest.raises(kt.NotFound, match="no bias_up"):
        run.adapters.read(TensorKey(LAYER, "bias_up", "base"), (EXPERTS, 1, INTER))
    with pytest.raises(kt.NotFound, match="is not known"):
        run.adapters.read(TensorKey(LAYER, "w_side", "base"), (EXPERTS, 1, INTER))


def test_memory_is_refused_before_anything_is_taken(tmp_path: Path) -> None:
    model = save_checkpoint("qwen3_moe", tmp_path / "model")
    with (
        ServerProcess(model, tmp_path / "log", "--memory-limit", "0.2937") as server,
        kt.connect(server.address) as client,
    ):
        run = client.open_run("small", wire_dtype="fp32", ephemeral=True)
        layers = [LayerLora(index, full=True) for index in range(3)]
        with pytest.raises(kt.OutOfCapacity):
            run.adapters.create(WEIGHTS, layers, trainable=True)
        assert forward(run)[0].shape == (12, HIDDEN)


def test_trained_weights_outlive_the_server(tmp_path: Path) -> None:
    model, state = save_checkpoint("qwen3_moe", tmp_path / "model"), str(tmp_path / "state")
    with ServerProcess(model, tmp_path / "log", "--state-dir", state) as server, kt.connect(server.address) as client:
        run = client.open_run("kept", wire_dtype="fp32")
        run.adapters.create(WEIGHTS, [LayerLora(LAYER, full=True)])
        backward(run, forward(run, WEIGHTS)[1], GradientTarget(WEIGHTS, BITS))
        run.step([ParamGroup(RATE, (), WEIGHTS)])
        trained, moment = forward(run, WEIGHTS)[0], read(run, "w_up", "exp_avg")
        run.save_checkpoint("mine")
        run.leave()
    with ServerProcess(model, tmp_path / "log", "--state-dir", state) as server, kt.connect(server.address) as client:
        run = client.open_run("kept", wire_dtype="fp32")
        run.load_checkpoint("mine")
        assert torch.equal(forward(run, WEIGHTS)[0], trained)
        assert torch.equal(read(run, "w_up", "exp_avg"), moment)
