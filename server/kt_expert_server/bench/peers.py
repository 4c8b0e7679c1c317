"""Other ways to compute the same layer: transformers' expert loop in torch, and kt-kernel in a Python that has it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kt_expert_server.bench.layer import Batch, random_matrix
from kt_expert_server.bench.shapes import LayerShape
from kt_expert_server.errors import InvalidRequest

_PEER_TIMEOUT_S = 600.0  # to start with its weights, and to answer one batch
_KT_KERNEL_SCRIPT = Path(__file__).with_name("kt_kernel_peer.py")


class Peer(Protocol):
    """A contender. `run` returns seconds of a forward and, where it has one, of its backward."""

    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int | None:
        """Of its LoRA, where it does the work of one rank only; None where it is compared whatever ours is."""

    def run(self, batch: Batch) -> tuple[float, float | None]: ...

    def close(self) -> None: ...


class TorchWeights:
    """One layer in fp32, for every loop over it. Raises InvalidRequest where there is no torch."""

    def __init__(self, shape: LayerShape, threads: int) -> None:
        # OpenMP's threads would spin on after each of torch's loops, into the time of what is measured next.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            import torch  # optional, and slow to import
        except ImportError as error:
            raise InvalidRequest("--against torch needs torch: pip install 'kt-expert[bench]'") from error
        torch.set_num_threads(threads)
        self.torch: Any = torch
        self.shape = shape
        pattern = (random_matrix(shape, np.random.default_rng(0)).astype(np.uint32) << 16).view(np.float32)
        base = torch.from_numpy(pattern)
        self.gate, self.up = (
            torch.stack([base.roll(64 * (3 * e + n)).view(shape.intermediate, shape.hidden) for e in range(shape.experts)])
            for n in range(2)
        )
        self.down = torch.stack(
            [base.roll(64 * (3 * e + 2)).view(shape.hidden, shape.intermediate) for e in range(shape.experts)]
        )


class TorchLoop:
    """transformers' eager loop over experts, in fp32; with a rank, LoRA on every projection and autograd through it."""

    def __init__(self, weights: TorchWeights, rank: int) -> None:
        self._weights, self._torch, self._rank = weights, weights.torch, rank
        shape, torch = weights.shape, weights.torch
        sizes = {
            "gate": (shape.intermediate, shape.hidden),
            "up": (shape.intermediate, shape.hidden),
            "down": (shape.hidden, shape.intermediate),
        }
        self._lora = {
            name: (
                torch.full((shape.experts, rank, columns), 0.01, requires_grad=True),
                torch.full((shape.experts, rows, rank), 0.01, requires_grad=True),
            )
            for name, (rows, columns) in sizes.items()
            if rank
        }

    @property
    def name(self) -> str:
        return "torch_fp32_lora" if self._rank else "torch_fp32"

    @property
    def rank(self) -> int | None:
        return self._rank or None

    def run(self, batch: Batch) -> tuple[float, float | None]:
        torch = self._torch
        x, dy = (torch.from_numpy((bits.astype(np.uint32) << 16).view(np.float32)) for bits in (batch.x, batch.dy))
        chosen, weights = torch.from_numpy(batch.ids), torch.from_numpy(batch.weights)
        if not self._rank:
            with torch.no_grad():
                begun = time.perf_counter()
                self._forward(x, chosen, weights)
                return time.perf_counter() - begun, None
        x.requires_grad_()
        begun = time.perf_counter()
        y = self._forward(x, chosen, weights)
        middle = time.perf_counter()
        y.backward(dy)
        ended = time.perf_counter()
        for pair in self._lora.values():
            for tensor in pair:
                tensor.grad = None
        return middle - begun, ended - middle

    def close(self) -> None:
        pass

    def _project(self, name: str, base: Any, expert: int, rows: Any) -> Any:
        out = rows @ base[expert].T
        if not self._rank:
            return out
        a, b = self._lora[name]
        return out + 2.0 * (rows @ a[expert].T) @ b[expert].T

    def _forward(self, x: Any, chosen: Any, weights: Any) -> Any:
        torch = self._torch
        output = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            token, slot = torch.where(chosen == expert)
            rows = x[token]
            gate = self._project("gate", self._weights.gate, expert, rows)
            up = self._project("up", self._weights.up, expert, rows)
            h = torch.nn.functional.silu(gate) * up
            out = self._project("down", self._weights.down, expert, h) * weights[token, slot, None]
            output = output.index_add(0, token, out)
        return output


class KtKernel:
    """kt-kernel's bf16 forward, in a process of the Python that has it: one line asks for a batch size, one answers."""

    name = "kt_kernel_bf16"
    rank = None  # its forward has no LoRA

    def __init__(self, shape: LayerShape, threads: int, python: str, max_tokens: int) -> None:
        sizes = (shape.experts, shape.hidden, shape.intermediate, shape.top_k, threads, max_tokens)
        command = [*shlex.split(python), str(_KT_KERNEL_SCRIPT), *(str(size) for size in sizes)]
        try:
            # A group of its own: the command may be a wrapper, whose children would outlive it.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
            )
        except OSError as error:
            raise InvalidRequest(f"--kt-kernel-python {python!r} cannot be started: {error}") from error
        self._python = python
        if self._answer() != "ready":
            raise AssertionError("the script says nothing else first")

    def run(self, batch: Batch) -> tuple[float, float | None]:
        if self._process.stdin is None:
            raise AssertionError("opened with a pipe")
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the answer will say
            self._process.stdin.write(f"{batch.tokens}\n")
            self._process.stdin.flush()
        return float(self._answer()), None

    def close(self) -> None:
        self._kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process.wait()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _answer(self) -> str:
        """Raises InvalidRequest where the process ends first, or is ended because it took too long."""
        too_late = threading.Timer(_PEER_TIMEOUT_S, self._kill)
        too_late.start()
        try:
            # The engine prints on its own behalf; answers are marked.
            for line in self._process.stdout or ():
                if line.startswith("@ "):
                    return line[2:].strip()
        finally:
            too_late.cancel()
        self.close()
        raise InvalidRequest(
            f"kt-kernel in {self._python!r} ended with status {self._process.returncode} before it answered (within "
            f"{_PEER_TIMEOUT_S:g} s); what it said is above. It needs a Python with kt-kernel and torch"
        )
