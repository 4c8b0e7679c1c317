"""Minutes of trouble: trainers that cancel, vanish and come back, and a server that must not grow: python -m soak MINUTES."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kt_expert_client as kt
from kt_expert_client import AdamW
from support.batches import LAYERS, LORA, batch, train_step
from support.models import save_checkpoint
from support.proxy import FaultProxy, SameHostProxy
from support.server import ServerProcess
from support.sockets import free_port

TRAINERS = 3
TROUBLE = 0.2  # chance that a round is cancelled, and that one ends without a word
WARM_UP = 0.4  # of the time: allocators and caches fill
MOST_GROWTH_PER_MINUTE = (
    2 << 20
)  # bytes of the heap after the warm-up; what is in flight makes it uncertain by a third of a MiB
# Of resident memory: malloc keeps and gives back megabytes at a time, so it goes up and down by as much around what is used.
MOST_RESIDENT_GROWTH = 12 << 20  # bytes, from the least of the first half after the warm-up to the least of the second
_SAMPLE_S = 0.5
# What a vanished trainer holds is otherwise kept for a quarter of an hour, and would look like growth.
FORGETFUL = ("--lease", "2", "--retention", "2")


@dataclass(frozen=True, slots=True)
class Sample:
    at: float  # seconds
    heap: float  # bytes
    resident: int  # bytes
    descriptors: int
    threads: int


def trainer(address: str, seed: int, stop: threading.Event, rounds: list[int]) -> None:
    rng = random.Random(seed)
    while not stop.is_set():
        client = kt.connect(address, transport=("stream", "same-host", "tcp")[seed % 3])
        run = client.open_run(lora=LORA, wire_dtype="fp32", seed=seed)
        for round_ in range(rng.randrange(1, 12)):
            if stop.is_set():
                break
            if rng.random() < TROUBLE:
                cancelled(run, rng)
            train_step(run, round_, tokens=rng.choice((1, 12, 300)))
            run.step(AdamW(1e-3))
            rounds[seed] += 1
        if rng.random() < TROUBLE:
            run._session.close()  # as a process that dies
        client.close()


def cancelled(run: kt.Run, rng: random.Random) -> None:
    x, ids, weights = batch(rng.choice((1, 500)), 1)
    handle = run.submit_forward(rng.randrange(LAYERS), x, ids, weights)
    run._session.cancel(handle.pending.call)
    try:
        handle.result()
        run.release(handle.ticket)
    except kt.Cancelled:
        pass


def trouble(proxies: Sequence[FaultProxy | SameHostProxy], stop: threading.Event) -> None:
    rng = random.Random(9)
    while not stop.wait(rng.expovariate(2.0)):
        for each in proxies:
            each.cut()


class Watch:
    """Memory, descriptors and threads of the server over time."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._process = Path("/proc") / str(server.process.pid)
        self.samples: list[Sample] = []

    def sample(self) -> None:
        status = (self._process / "status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        resident, heap = int(fields["VmRSS"].split()[0]) * 1024, self._server.metric("kt_expert_heap_bytes")
        descriptors = len(list((self._process / "fd").iterdir()))
        self.samples.append(Sample(time.monotonic(), heap, resident, descriptors, int(fields["Threads"])))

    def after_warm_up(self) -> list[Sample]:
        return self.samples[int(len(self.samples) * WARM_UP) :]

    def heap_growth_per_minute(self) -> float:
        """By least squares."""
        kept = self.after_warm_up()
        times, sizes = [each.at for each in kept], [each.heap for each in kept]
        mean_t, mean_s = sum(times) / len(kept), sum(sizes) / len(kept)
        slope = sum((t - mean_t) * (s - mean_s) for t, s in zip(times, sizes, strict=True))
        return 60 * slope / sum((t - mean_t) ** 2 for t in times)

    def resident_growth(self) -> int:
        sizes = [each.resident for each in self.after_warm_up()]
        half = len(sizes) // 2
        return min(sizes[half:]) - min(sizes[:half])


def main(minutes: float) -> int:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = save_checkpoint("qwen3_moe", Path(directory) / "model")
        own, cut = Path(directory) / "own", Path(directory) / "cut"
        os.environ["KT_EXPERT_SAME_HOST_DIR"] = str(cut)
        port = free_port()
        with FaultProxy(f"127.0.0.1:{port}") as data:
            options = ("--same-host", str(own), "--data-listen", f"127.0.0.1:{port}", "--data-address", data.address)
            with (
                ServerProcess(checkpoint, Path(directory) / "log", *FORGETFUL, *options) as server,
                FaultProxy(server.address) as proxy,
                SameHostProxy(own, cut) as other,
            ):
                return _soak(server, proxy, other, data, minutes)


def _soak(server: ServerProcess, proxy: FaultProxy, other: SameHostProxy, data: FaultProxy, minutes: float) -> int:
    stop, rounds, watch = threading.Event(), [0] * TRAINERS, Watch(server)
    threads = [threading.Thread(target=trainer, args=(proxy.address, seed, stop, rounds)) for seed in range(TRAINERS)]
    threads.append(threading.Thread(target=trouble, args=((proxy, other, data), stop)))
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60 * minutes
    while time.monotonic() < deadline and all(thread.is_alive() for thread in threads):
        watch.sample()
        time.sleep(_SAMPLE_S)
    died = sum(not thread.is_alive() for thread in threads)
    stop.set()
    for thread in threads:
        thread.join(60)
    heap, resident, kept = watch.heap_growth_per_minute(), watch.resident_growth(), watch.after_warm_up()
    descriptors, threads_seen = [each.descriptors for each in kept], [each.threads for each in kept]
    half = len(kept) // 2
    grew = max(descriptors[half:]) > max(descriptors[:half]) + 8 or max(threads_seen[half:]) > max(threads_seen[:half]) + 2
    grew = grew or heap > MOST_GROWTH_PER_MINUTE or resident > MOST_RESIDENT_GROWTH
    print(
        f"soak: {minutes:g} minutes, {sum(rounds)} steps, {proxy.cuts} cuts of streams, {other.cuts} of shared memory, "
        f"{data.cuts} of the data port, "
        f"heap {heap / 1024:+.0f} KiB a minute, resident memory {resident / 1024:+.0f} KiB, "
        f"descriptors {min(descriptors)} to {max(descriptors)}, threads {min(threads_seen)} to {max(threads_seen)}, "
        f"trainers that failed {died}"
    )
    return 1 if died or grew or min(rounds) == 0 else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
