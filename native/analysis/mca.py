"""Vector loops in llvm-mca: cycles a pass through the loop takes, beside what the busiest unit alone would take."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass

from analysis.disassembly import Instruction, Loop

ITERATIONS = 400  # enough that filling the pipeline does not show
MULTIPLIES = ("vfmadd", "vdpbf16ps", "vpdpbusd")
_LABEL = ".Lloop"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one pass through a loop, in cycles."""

    cycles: float
    resource_bound: float  # llvm-mca's block throughput: the busiest unit
    multiply_bound: float  # the same for the multiplications alone

    @property
    def of_resource_bound(self) -> float:
        return self.resource_bound / self.cycles

    @property
    def of_multiply_bound(self) -> float:
        return self.multiply_bound / self.cycles


def predict(loop: Loop, cpu: str) -> Prediction:
    """Raises CalledProcessError where llvm-mca does not know an instruction or the processor."""
    cycles, bound = _simulate(loop.body, cpu)
    _, multiply_bound = _simulate([each for each in loop.body if each.mnemonic.startswith(MULTIPLIES)], cpu)
    return Prediction(cycles, bound, multiply_bound)


def _simulate(body: list[Instruction] | tuple[Instruction, ...], cpu: str) -> tuple[float, float]:
    lines = [f"{each.mnemonic} {_LABEL}" if each.target is not None else each.text for each in body]
    source = "\n".join([f"{_LABEL}:", *lines, ""])
    command = ["llvm-mca-19", "-mtriple=x86_64", f"-mcpu={cpu}", f"-iterations={ITERATIONS}", "--json"]
    output = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    summary = json.loads(output)["CodeRegions"][0]["SummaryView"]
    return summary["TotalCycles"] / summary["Iterations"], summary["BlockRThroughput"]
