"""Small forwards that keep nothing go past the server's state machine: to the same bits, in the same order, or not at all."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import kt_expert_client as kt
import pytest
import torch
from kt_expert_client import AdamW
from kt_expert_client.run import Run
from kt_expert_client.wire.fast_path import FastPath
from support.batches import LAYERS, LORA, batch, opened, train_step
from support.server import ServerProcess
from support.waiting import wait_until

DONE, BUSY = (f'kt_expert_fast_forwards_total{{outcome="{each}"}}' for each in ("done", "busy"))


@pytest.fixture
def own(qwen3_checkpoint: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    options = ("--state-dir", str(tmp_path / "state"))
    with ServerProcess(qwen3_checkpoint, tmp_path / "log", *options) as server:
        yield server


def look(run: Run, tokens: int, seed: int, layer: int = 0, **options: object) -> torch.Tensor:
    """A forward that keeps nothing."""
    return run.submit_forward(layer, *batch(tokens, seed), save_for_backward=False, **options).result()  # type: ignore[arg-type]


def path_of(run: Run) -> FastPath:
    path = run._session.fast_path()
    assert path is not None
    return path


def counted(server: ServerProcess, action: Callable[[], object]) -> float:
    """How many forwards were fast meanwhile."""
    before = server.metric(DONE)
    action()
    return server.metric(DONE) - before


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
def test_the_bits_are_those_of_the_ordinary_way(own: ServerProcess, dtype: str, tokens: int) -> None:
    with kt.connect(own.address, transport="same-host") as client:
        run = client.open_run(lora=LORA, wire_dtype=dtype, seed=3)
        train_step(run, 1)
        run.step(AdamW(1e-2))
        for layer in range(LAYERS):
            for adapters in (None, ()):
                x, ids, weights = batch(tokens, 1)
                kept = run.submit_forward(layer, x, ids, weights, adapters=adapters)
                expected = kept.result()
                run.release(kept.ticket)
                assert torch.equal(look(run, tokens, 1, layer, adapters=adapters), expected)  # tells the number
                for _ in range(3):
                    assert torch.equal(look(run, tokens, 1, layer, adapters=adapters), expected)
    assert own.metric(DONE) == 3 * 2 * LAYERS
    assert own.metric('kt_expert_tokens_total{pass="forward"}') >= 5 * 2 * LAYERS * tokens
    assert own.metric("kt_expert_fast_forward_seconds_total") > 0.0


def test_what_is_large_or_dropped_or_measured_goes_the_ordinary_way(own: ServerProcess) -> None:
    with kt.connect(own.address, transport="same-host") as client:
        run = opened(client)

        def ordinary() -> None:
            for _ in range(3):
                look(run, 65, 1)
                look(run, 1, 1, dropout_seed=5)

        assert counted(own, ordinary) == 0
        look(run, 1, 1)
        assert counted(own, lambda: look(run, 1, 1)) == 1
        client.recorder.listen(lambda _: None)
        assert counted(own, lambda: look(run, 1, 1)) == 0


def test_over_a_network_there_is_none(server: ServerProcess) -> None:
    for transport in ("tcp", "stream"):
        with kt.connect(server.address, transport=transport) as client:
            run = opened(client)
            look(run, 1, 1)
            assert run._session.fast_path() is None
            look(run, 1, 1)


def _random_life(run: Run, seed: int, look_at: Callable[[torch.Tensor], None]) -> None:
    """What changes a run, in any order, with looks in between."""
    rng = random.Random(seed)  # noqa: S311  # for tests
    values = torch.Generator().manual_seed(seed)

    def write() -> None:
        key = rng.choice(sorted(run.get_adapter()))
        shape = run.get_adapter()[key].shape
        run.put_adapter({key: torch.randn(shape, generator=values)})

    def step() -> None:
        train_step(run, rng.randrange(100))
        run.step(AdamW(1e-1))

    def copy() -> None:
        name = f"copy-{rng.randrange(3)}"
        run.adapters.copy("default", name)
        for _ in range(2):
            look_at(look(run, 2, 7, adapters=[kt.ActiveAdapter(name)]))
        run.adapters.delete(name)

    def save_and_load() -> None:
        name = f"run-{run.name}-{rng.randrange(10**9)}"
        run.save_checkpoint(name)
        write()
        look_at(look(run, 3, 1))
        run.load_checkpoint(name)

    for _ in range(12):
        for _ in range(rng.randrange(1, 4)):
            look_at(look(run, rng.choice((1, 3, 64)), rng.randrange(3), rng.randrange(LAYERS)))
            scale = rng.choice((None, 0.5))
            look_at(look(run, 2, 2, adapters=[kt.ActiveAdapter("default", scale, scale, scale)]))
        rng.choice((write, step, copy, save_and_load, run.zero_grad))()


@pytest.mark.parametrize("seed", range(4))
def test_a_runs_changes_are_seen_at_once(own: ServerProcess, seed: int) -> None:
    """The same life over a stream, which has no such way."""
    found: dict[str, list[torch.Tensor]] = {"stream": [], "same-host": []}
    for transport, outputs in found.items():
        with kt.connect(own.address, transport=transport) as client:
            fast = counted(own, lambda: _random_life(opened(client), seed, outputs.append))  # noqa: B023  # called at once
            assert (fast > 10) == (transport == "same-host")
    assert len(found["stream"]) == len(found["same-host"])
    for left, right in zip(*found.values(), strict=True):
        assert torch.equal(left, right)


def test_what_was_submitted_before_comes_first(own: ServerProcess) -> None:
    with kt.connect(own.address, transport="same-host") as client:
        run = opened(client)
        look(run, 1, 1)
        path_of(run)
        os.kill(own.process.pid, signal.SIGSTOP)
        try:
            kept = run.submit_forward(0, *batch(3, 1))
            assert run._session.fast_path() is None
        finally:
            os.kill(own.process.pid, signal.SIGCONT)
        kept.result()
        path_of(run)


def test_an_error_is_that_of_the_ordinary_way(own: ServerProcess) -> None:
    with kt.connect(own.address, transport="same-host") as client:
        run = opened(client)
        x, ids, weights = batch(2, 1)
        expected = look(run, 2, 1)
        for wrong in (-1, 99):
            bad = ids.clone()
            bad[1, 0] = wrong
            handle = run.submit_forward(0, x, bad, weights, save_for_backward=False)
            with pytest.raises(kt.InvalidRequest, match="expert id"):
                handle.result()
        assert counted(own, lambda: look(run, 2, 1)) == 1
        assert torch.equal(look(run, 2, 1), expected)


def test_outputs_that_nobody_takes(own: ServerProcess) -> None:
    with kt.connect(own.address, transport="same-host") as client:
        run = opened(client)
        expected = [look(run, 1, seed) for seed in range(3)]
        given_up = run.submit_forward(0, *batch(1, 0), save_for_backward=False)
        run.abandon(given_up)
        run.submit_forward(0, *batch(1, 1), save_for_backward=False)  # nobody has its handle
        assert torch.equal(look(run, 1, 2), expected[2])
        first, second = (run.submit_forward(0, *batch(1, seed), save_for_backward=False) for seed in (0, 1))
        assert torch.equal(second.result(), expected[1])  # went the ordinary way beside the first
        assert torch.equal(first.result(), expected[0])
        assert torch.equal(first.result(), expected[0])
        looked_at = run.submit_forward(0, *batch(1, 2), save_for_backward=False)
        assert looked_at.pending.request_id > 0  # becomes the session's
        assert torch.equal(looked_at.result(), expected[2])


def test_beside_other_work_it_takes_its_turn(own: ServerProcess) -> None:
    """Forwards of one run while another trains: some find the engine at work, all have their bits."""
    with kt.connect(own.address, transport="same-host") as client, kt.connect(own.address) as other:
        run, training = opened(client), opened(other)
        expected = [look(run, 3, seed) for seed in range(4)]
        stop = threading.Event()

        def train() -> None:
            while not stop.is_set():
                train_step(training, 1, tokens=4000)

        thread = threading.Thread(target=train)
        thread.start()
        try:
            for _ in range(50):
                assert all(torch.equal(look(run, 3, seed), expected[seed]) for seed in range(4))
            wait_until(lambda: torch.equal(look(run, 3, 1), expected[1]) and own.metric(BUSY) > 0, 30.0)
        finally:
            stop.set()
            thread.join()


def test_threads_share_it(own: ServerProcess) -> None:
    with kt.connect(own.address, transport="same-host") as client:
        run = opened(client)
        expected = [look(run, 2, seed) for seed in range(4)]
        wrong: list[int] = []

        def work(seed: int) -> None:
            for _ in range(100):
                if not torch.equal(look(run, 2, seed), expected[seed]):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_server_that_stands_still_is_waited_for(own: ServerProcess) -> None:
    with kt.connect(own.address, transport="same-host") as client:
        run = opened(client)
        expected = look(run, 1, 1)
        look(run, 1, 1)
        os.kill(own.process.pid, signal.SIGSTOP)
        threading.Timer(3.5, os.kill, (own.process.pid, signal.SIGCONT)).start()
        assert torch.equal(look(run, 1, 1), expected)
        assert torch.equal(look(run, 1, 1), expected)


def test_a_closed_run_computes_nothing_more(own: ServerProcess) -> None:
    with kt.connect(own.address, transport="same-host") as client, kt.connect(own.address) as other:
        run = opened(client, name="closing", ephemeral=True)
        look(run, 1, 1)
        look(run, 1, 1)
        other.close_run("closing")
        before = own.metric(DONE)
        with pytest.raises(kt.KtExpertError):
            look(run, 1, 1)
        assert own.metric(DONE) == before


@pytest.mark.parametrize("spin", ["51", "-1", "1.5", "much"])
def test_a_spin_that_makes_no_sense(server: ServerProcess, spin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_EXPERT_SPIN", spin)
    with pytest.raises(kt.InvalidRequest, match=f"KT_EXPERT_SPIN is '{spin}', expected microseconds from 0 to 50"):
        kt.connect(server.address)


def test_spinning_has_the_same_bits(qwen3_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KT_EXPERT_SPIN", "50")
    with (
        ServerProcess(qwen3_checkpoint, tmp_path / "log", "--spin", "50") as spinning,
        kt.connect(spinning.address, transport="same-host") as client,
    ):
        run = opened(client)
        expected = look(run, 2, 1)
        assert counted(spinning, lambda: [look(run, 2, 1) for _ in range(20)]) == 20
        assert torch.equal(look(run, 2, 1), expected)


def test_its_memory_is_counted_and_given_back(own: ServerProcess) -> None:
    def scratch() -> float:
        return own.metric('kt_expert_memory_bytes{kind="scratch"}')

    with kt.connect(own.address, transport="same-host") as client:
        run = opened(client)
        train_step(run, 1)
        before = scratch()
        look(run, 1, 1)
        assert scratch() > before
        train_step(run, 1)  # a backward revokes
        assert scratch() == before
    wait_until(lambda: own.metric('kt_expert_memory_bytes{kind="shared"}') == 0.0, 10.0)
