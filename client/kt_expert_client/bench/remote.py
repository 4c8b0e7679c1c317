"""The trainer's side of `kt-expert bench remote`: a process that connects, and times calls as it is told line by line.

On standard input come JSON objects, one a line, each answered by one:

* {"open": address, "rank": r, "transport": t, "seed": s} joins a run with LoRA, or without for rank 0
* {"call": {...}} times forwards and backwards of one batch
* {"decode": {...}} times forwards of one batch that keep nothing
* {"echo": {...}} times forwards that compute nothing
* {"stall": {...}} tells how long another thread of this process stood still during calls
* {"train": {...}} trains for some seconds beside others
* {"close": true} leaves
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from typing import Any

import torch

from kt_expert_client.adapter import LayerLora
from kt_expert_client.connection import Client, connect
from kt_expert_client.run import Run

_SEED = 0
_LOOK_S = 0.0002  # between a watching thread's looks at the clock
_IDLE_S = 0.5


class Timer:
    """One run on one server."""

    def __init__(self, address: str, rank: int, transport: str | None = None, seed: int = _SEED) -> None:
        self._seed = seed  # of its batches
        self._client: Client = connect(address, transport=transport)
        spec = self._client.layers[0]
        self._hidden, self._experts, self._top_k = spec.hidden_size, spec.num_experts, spec.top_k
        lora = [LayerLora(0, False, rank, rank, rank, 2.0, 2.0, 2.0)] if rank else []
        self._run: Run = self._client.open_run(lora=lora)

    def call(self, tokens: int, in_flight: int, repeats: int) -> dict[str, float]:
        """Median seconds a call of a forward and of its backward, `in_flight` calls at a time."""
        hidden, gradient, ids, weights = self._batch(tokens)
        forwards, backwards = [], []
        for _ in range(repeats):
            begun = time.perf_counter()
            sent = [self._run.submit_forward(0, hidden, ids, weights, borrow=True) for _ in range(in_flight)]
            for each in sent:
                each.result()
            forwards.append((time.perf_counter() - begun) / in_flight)
            begun = time.perf_counter()
            back = [self._run.submit_backward(0, each.ticket, gradient, borrow=True) for each in sent]
            for each_back in back:
                each_back.result()
            backwards.append((time.perf_counter() - begun) / in_flight)
        return {"forward_s": statistics.median(forwards), "backward_s": statistics.median(backwards)}

    def decode(self, tokens: int, repeats: int) -> dict[str, float]:
        """Median seconds of a forward that keeps nothing."""
        hidden, _, ids, weights = self._batch(tokens)
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            self._run.submit_forward(0, hidden, ids, weights, save_for_backward=False, borrow=True).result()
            times.append(time.perf_counter() - begun)
        return {"forward_s": statistics.median(times)}

    def stall(self, tokens: int, calls: int) -> dict[str, float]:
        """The longest gap that a thread which looks at the clock all the time sees, during such calls and without them."""
        gaps: list[float] = []
        ended = threading.Event()

        def watch() -> None:
            last = time.perf_counter()
            while not ended.is_set():
                time.sleep(_LOOK_S)
                now = time.perf_counter()
                gaps.append(now - last)
                last = now

        watcher = threading.Thread(target=watch)
        watcher.start()
        time.sleep(_IDLE_S)
        idle, gaps[:] = max(gaps), []
        self.call(tokens, 1, calls)
        during = max(gaps)
        ended.set()
        watcher.join()
        return {"idle_s": idle, "during_s": during}

    def train(self, tokens: int, begin: float, seconds: float) -> dict[str, float]:
        """Forwards and backwards one after another from `begin` on, a time as time.time() gives it, and how long they took."""
        hidden, gradient, ids, weights = self._batch(tokens)
        time.sleep(max(0.0, begin - time.time()))
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() < begun + seconds:
            sent = self._run.submit_forward(0, hidden, ids, weights, borrow=True)
            sent.result()
            self._run.submit_backward(0, sent.ticket, gradient, borrow=True).result()
            steps += 1
        return {"tokens": steps * tokens, "seconds": time.perf_counter() - begun}

    def _batch(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states and a gradient in bf16, distinct expert ids, routing weights."""
        generator = torch.Generator().manual_seed(self._seed + tokens)
        hidden, gradient = (torch.randn(tokens, self._hidden, generator=generator).to(torch.bfloat16) for _ in range(2))
        order = torch.rand(tokens, self._experts, generator=generator).argsort(dim=1)[:, : self._top_k]
        return hidden, gradient, order.to(torch.int32).contiguous(), torch.full((tokens, self._top_k), 1.0 / self._top_k)

    def echo(self, tokens: int, least_s: float, most: int) -> dict[str, float]:
        """Forwards whose routes are all skipped: median seconds, this process's seconds on processors a call, and the calls."""
        hidden = torch.zeros(tokens, self._hidden, dtype=torch.bfloat16)
        ids = torch.full((tokens, self._top_k), self._experts, dtype=torch.int32)
        weights = torch.zeros(tokens, self._top_k)
        times: list[float] = []
        begun_cpu = time.process_time()
        while sum(times) < least_s and len(times) < most:
            begun = time.perf_counter()
            self._run.submit_forward(0, hidden, ids, weights, save_for_backward=False, adapters=(), borrow=True).result()
            times.append(time.perf_counter() - begun)
        cpu_s = (time.process_time() - begun_cpu) / len(times)
        return {"seconds": statistics.median(times), "cpu_s": cpu_s, "calls": len(times)}

    def close(self) -> None:
        self._run.leave()
        self._client.close()


def main() -> None:
    timer: Timer | None = None
    for line in sys.stdin:
        asked: dict[str, Any] = json.loads(line)
        answer: dict[str, Any] = {}
        if "open" in asked:
            timer = Timer(asked["open"], int(asked["rank"]), asked.get("transport"), int(asked.get("seed", _SEED)))
        elif "call" in asked and timer is not None:
            answer = timer.call(**asked["call"])
        elif "decode" in asked and timer is not None:
            answer = timer.decode(**asked["decode"])
        elif "echo" in asked and timer is not None:
            answer = timer.echo(**asked["echo"])
        elif "stall" in asked and timer is not None:
            answer = timer.stall(**asked["stall"])
        elif "train" in asked and timer is not None:
            answer = timer.train(**asked["train"])
        elif timer is not None:
            timer.close()
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
