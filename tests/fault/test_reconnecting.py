"""A real client and a real server with trouble in between: training goes on, to the same bits."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import AdamW, RunOptions
from kt_expert_client.adapter import AdapterTensors
from support.batches import LORA, train_step
from support.proxy import FaultProxy, SameHostProxy
from support.server import ServerProcess
from support.sockets import free_port
from support.waiting import wait_until

STEPS = 8
REPLAY = RunOptions(replay_window=0.1)


class Restartable:
    """A server on one port and one state directory, which is killed and started again."""

    def __init__(self, checkpoint: Path, directory: Path, *arguments: str) -> None:
        self._checkpoint, self._directory = checkpoint, directory
        self._arguments = ("--listen", f"127.0.0.1:{free_port()}", "--state-dir", str(directory / "state"), *arguments)
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.process = ServerProcess(self._checkpoint, self._directory / f"log-{self.starts}", *self._arguments)
        self.address = self.process.address

    def kill(self) -> None:
        self.process.process.kill()
        self.process.stop()


@pytest.fixture
def restartable(qwen3_checkpoint: Path, tmp_path: Path) -> Iterator[Restartable]:
    server = Restartable(qwen3_checkpoint, tmp_path, "--checkpoint-every", "2")
    yield server
    server.process.stop()


def train(run: kt.Run, steps: range, before_step: Callable[[int], None] = lambda _: None) -> AdapterTensors:
    for step in steps:
        train_step(run, step)
        before_step(step)
        train_step(run, 100 + step)
        assert run.step(AdamW(1e-2), grad_scale=0.5) == step + 1
    return run.get_adapter(moments=True)


@pytest.fixture(scope="module")
def undisturbed(server: ServerProcess) -> AdapterTensors:
    with kt.connect(server.address) as client:
        return train(client.open_run(lora=LORA, wire_dtype="fp32", seed=3), range(STEPS))


def same(left: AdapterTensors, right: AdapterTensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def test_cuts_are_not_noticed(server: ServerProcess, undisturbed: AdapterTensors) -> None:
    with FaultProxy(server.address) as proxy, kt.connect(proxy.address, transport="stream") as client:
        _cut_while_training(client, proxy, undisturbed)


def test_cuts_of_shared_memory_are_not_noticed(
    qwen3_checkpoint: Path, undisturbed: AdapterTensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KT_EXPERT_SAME_HOST_DIR", str(tmp_path / "cut"))
    with (
        ServerProcess(qwen3_checkpoint, tmp_path / "log", "--same-host", str(tmp_path / "own")) as server,
        SameHostProxy(tmp_path / "own", tmp_path / "cut") as proxy,
        kt.connect(server.address, transport="same-host") as client,
    ):
        _cut_while_training(client, proxy, undisturbed)


def through(proxy: FaultProxy, port: int) -> tuple[str, ...]:
    """Has a server's data port behind a proxy to it."""
    return "--data-listen", f"127.0.0.1:{port}", "--data-address", proxy.address


def test_cuts_of_the_data_port_are_not_noticed(qwen3_checkpoint: Path, undisturbed: AdapterTensors, tmp_path: Path) -> None:
    port = free_port()
    with (
        FaultProxy(f"127.0.0.1:{port}") as proxy,
        ServerProcess(qwen3_checkpoint, tmp_path / "log", *through(proxy, port)) as server,
        kt.connect(server.address, transport="tcp") as client,
    ):
        _cut_while_training(client, proxy, undisturbed)


@pytest.mark.parametrize("seed", range(3))
def test_damage_at_the_data_port_is_found_and_mended(
    qwen3_checkpoint: Path, undisturbed: AdapterTensors, tmp_path: Path, seed: int
) -> None:
    port = free_port()
    with (
        FaultProxy(f"127.0.0.1:{port}") as proxy,
        ServerProcess(qwen3_checkpoint, tmp_path / "log", *through(proxy, port)) as server,
        kt.connect(server.address, transport="tcp") as client,
    ):
        run = client.open_run(lora=LORA, wire_dtype="fp32", seed=3)
        got = train(run, range(STEPS), lambda step: proxy.damage_next(1000 * seed + step))
        assert same(got, undisturbed)


def _cut_while_training(client: kt.Client, proxy: FaultProxy | SameHostProxy, undisturbed: AdapterTensors) -> None:
    stop = threading.Event()
    run = client.open_run(lora=LORA, wire_dtype="fp32", seed=3)

    def trouble() -> None:
        while not stop.wait(0.05):
            proxy.cut()

    thread = threading.Thread(target=trouble)
    thread.start()
    try:
        got = train(run, range(STEPS))
    finally:
        stop.set()
        thread.join()
    assert proxy.cuts > 2
    assert same(got, undisturbed)


@pytest.mark.parametrize("seed", range(4))
def test_damage_is_found_and_mended(server: ServerProcess, undisturbed: AdapterTensors, seed: int) -> None:
    with FaultProxy(server.address) as proxy, kt.connect(proxy.address, transport="stream") as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32", seed=3)
        got = train(run, range(STEPS), lambda step: proxy.damage_next(1000 * seed + step))
        assert same(got, undisturbed)


def test_a_server_that_is_killed_and_started_again_is_brought_back(
    restartable: Restartable, undisturbed: AdapterTensors
) -> None:
    def kill(step: int) -> None:
        if step in (1, 4, 5):
            restartable.kill()
            restartable.start()

    with kt.connect(restartable.address) as client:
        run = client.open_run("named", lora=LORA, wire_dtype="fp32", seed=3, options=REPLAY)
        assert same(train(run, range(STEPS), kill), undisturbed)
        assert restartable.starts == 4


DEATHS = 50
STOPPED_EACH = 5  # one death in so many is SIGTERM, the others are kill -9


@pytest.mark.timeout(900)
def test_deaths_at_random_instants(server: ServerProcess, qwen3_checkpoint: Path, tmp_path: Path) -> None:
    """Whatever the server was doing: computing, stepping, writing one of the checkpoints it takes at every step."""
    restartable = Restartable(qwen3_checkpoint, tmp_path, "--checkpoint-every", "1")
    rng, steps = random.Random(11), 0

    def die() -> None:
        for death in range(DEATHS):
            time.sleep(rng.uniform(0.0, 0.6))
            if death % STOPPED_EACH == STOPPED_EACH - 1:
                assert restartable.process.stop() == 0
            else:
                restartable.kill()
            restartable.start()

    with kt.connect(restartable.address) as client:
        run = client.open_run("mortal", lora=LORA, wire_dtype="fp32", seed=3, options=REPLAY)
        thread = threading.Thread(target=die)
        thread.start()
        while thread.is_alive():
            train(run, range(steps, steps + 1))
            steps += 1
        thread.join()
        got = train(run, range(steps, steps + 1))
    assert restartable.starts == 1 + DEATHS
    with kt.connect(server.address) as client:
        expected = train(client.open_run(lora=LORA, wire_dtype="fp32", seed=3), range(steps + 1))
    assert same(got, expected)
    restartable.process.stop()


def test_without_replay_a_lost_state_is_told_and_training_resumes_from_the_step_named(
    restartable: Restartable, undisturbed: AdapterTensors
) -> None:
    with kt.connect(restartable.address) as client:
        run = client.open_run("named", lora=LORA, wire_dtype="fp32", seed=3)
        train(run, range(5))
        train_step(run, 5)
        restartable.kill()
        restartable.start()
        with pytest.raises(kt.RunStateLost, match="go on from step 4") as caught:
            run.grad_norm()
        assert caught.value.step == 4
        with pytest.raises(kt.RunStateLost):
            train_step(run, 5)
        again = client.open_run("named", lora=LORA, wire_dtype="fp32", seed=3)
        assert again.steps_taken == 4
        assert same(train(again, range(4, STEPS)), undisturbed)


def test_a_stopped_server_keeps_its_trainers(restartable: Restartable, undisturbed: AdapterTensors) -> None:
    """SIGTERM writes a last checkpoint: what begins again at a step's end loses nothing even without replay."""
    with kt.connect(restartable.address) as client:
        run = client.open_run("named", lora=LORA, wire_dtype="fp32", seed=3)
        train(run, range(3))
        assert restartable.process.stop() == 0
        restartable.start()
        assert same(train(run, range(3, STEPS)), undisturbed)


def test_a_stopped_process_goes_on(restartable: Restartable, undisturbed: AdapterTensors) -> None:
    process = restartable.process.process

    def pause(step: int) -> None:
        if step == 2:
            os.kill(process.pid, signal.SIGSTOP)
            threading.Timer(3.0, os.kill, (process.pid, signal.SIGCONT)).start()

    with kt.connect(restartable.address) as client:
        run = client.open_run("named", lora=LORA, wire_dtype="fp32", seed=3)
        assert same(train(run, range(STEPS), pause), undisturbed)


def test_a_rank_is_not_taken_from_a_live_trainer(server: ServerProcess) -> None:
    with kt.connect(server.address) as client:
        first = client.open_run("held", lora=LORA, wire_dtype="fp32", ephemeral=True)
        train_step(first, 0)
        with pytest.raises(kt.AlreadyExists, match="is held by another trainer that is connected"):
            client.open_run("held", lora=LORA, wire_dtype="fp32", ephemeral=True)
        train_step(first, 1)
        second = client.open_run("held", lora=LORA, wire_dtype="fp32", ephemeral=True, takeover=True)
        train_step(second, 0)
        with pytest.raises(kt.WrongPhase, match="was taken over by another trainer"):
            train_step(first, 2)


def test_a_rank_whose_trainer_is_gone_is_waited_for(server: ServerProcess) -> None:
    """Its lease has to end first; until then it could come back."""
    with (
        FaultProxy(server.address) as proxy,
        kt.connect(proxy.address, transport="stream") as client,
        kt.connect(server.address) as other,
    ):
        client.open_run("waited-for", lora=LORA, wire_dtype="fp32", ephemeral=True)
        proxy.hold()
        proxy.cut()
        wait_until(lambda: _lease_left(other, "waited-for") > 0, what="the lease to run")
        begun = time.monotonic()
        with pytest.raises(kt.AlreadyExists, match=r"lost its connection; its lease ends in \d+ s"):
            other.open_run("waited-for", lora=LORA, wire_dtype="fp32", ephemeral=True, timeout_s=1.0)
        assert time.monotonic() - begun < 20
        other.close_run("waited-for")
        with pytest.raises(kt.NotFound):
            other.close_run("waited-for")
        proxy.flow()


def _lease_left(client: kt.Client, name: str) -> float:
    return next((member.lease_left_s for run in client.status().runs if run.run == name for member in run.members), 0.0)


def test_dropout_of_the_options_drops(server: ServerProcess) -> None:
    from support.batches import batch

    x, ids, weights = batch(40, 1)
    with kt.connect(server.address) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32", options=RunOptions(dropout=0.5))
        generator = torch.Generator().manual_seed(0)
        values = {key: torch.randn(value.shape, generator=generator) for key, value in run.get_adapter().items()}
        run.put_adapter(values)
        first, second = (run.submit_forward(0, x, ids, weights).result() for _ in range(2))
        assert not torch.equal(first, second)
        quiet = [run.submit_forward(0, x, ids, weights, save_for_backward=False).result() for _ in range(2)]
        assert torch.equal(*quiet)
        torch.manual_seed(5)
        third = run.submit_forward(0, x, ids, weights).result()
        torch.manual_seed(5)
        assert torch.equal(third, run.submit_forward(0, x, ids, weights).result())


def test_tensors_may_change_once_a_submit_has_returned(server: ServerProcess) -> None:
    from support.batches import batch

    x, ids, weights = batch(2000, 1)
    with kt.connect(server.address) as client:
        run = client.open_run(lora=LORA, wire_dtype="fp32")
        expected = run.submit_forward(0, x, ids, weights).result()
        handles = []
        for _ in range(4):
            given = x.clone()
            handles.append(run.submit_forward(0, given, ids, weights, save_for_backward=False))
            given.zero_()
        assert all(torch.equal(handle.result(), expected) for handle in handles)
