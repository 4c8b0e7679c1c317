"""kt-expert doctor: what this machine offers the server, and what stands in its way."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import kt_expert_native as native

from kt_expert_server.config import ISA_VARIABLE, available_cores, available_memory
from kt_expert_server.errors import InvalidRequest, ServerError
from kt_expert_server.model.index import plan_model
from kt_expert_server.model.kernel_choice import kernel_reason
from kt_expert_server.model.loader import AUTO_FORMAT
from kt_expert_server.model.memory_plan import format_bytes, plan_memory

_PACKAGES = ("grpcio", "protobuf", "numpy", "uvloop", "prometheus-client", "torch", "transformers", "peft")


def run(options: argparse.Namespace) -> int:
    """Prints one fact a line, problems last. Returns 1 where there is a problem."""
    problems: list[str] = []
    try:
        engine = native.Engine(1, os.environ.get(ISA_VARIABLE, ""))
    except native.NativeError as error:
        raise InvalidRequest(str(error)) from error
    _print_host(engine, problems)
    for name in _PACKAGES:
        print(f"{name:22}{_version(name)}")
    if options.model is not None:
        _print_model(options.model, engine, problems)
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("ok" if not problems else f"{len(problems)} problem(s)")
    return 1 if problems else 0


def _print_host(engine: native.Engine, problems: list[str]) -> None:
    print(f"{'kt-expert':22}{version('kt-expert')}, Python {platform.python_version()}, {platform.platform()}")
    print(f"{'processor':22}{_processor()}")
    for name, obstacle in native.list_isas():
        print(f"{'  ' + name:22}{obstacle or 'available'}")
    print(f"{'kernel in use':22}{engine.kernel('bf16')}: {kernel_reason(engine, 'bf16')}; {ISA_VARIABLE} forces another")
    print(f"{'cores':22}{available_cores()} for this process")
    print(f"{'memory':22}{format_bytes(available_memory())} for this process")
    for node, cpus in native.list_memory_nodes():
        print(f"{'  node ' + str(node):22}{len(cpus)} cores")
    print(f"{'huge pages':22}{_huge_pages()}")
    if engine.isa == "scalar":
        problems.append("only the scalar reference runs here: forward and backward will be very slow; use a CPU with AVX2")
    if sys.byteorder != "little":
        problems.append("this machine is big-endian; weights and frames are little-endian")


def _print_model(directory: Path, engine: native.Engine, problems: list[str]) -> None:
    try:
        plan = plan_model(directory)
        memory = plan_memory(plan, AUTO_FORMAT, available_memory())
        size = f"{format_bytes(memory.weights)} of experts in {plan.form}"
        print(f"{'model':22}{plan.model_type}, {len(plan.layers)} MoE layers, {size}")
        for form in sorted({layer.form for layer in plan.layers}):
            layers = [layer.layer for layer in plan.layers if layer.form == form]
            print(f"{'  layers in ' + form:22}{_ranges(layers)} on {engine.kernel(form)}: {kernel_reason(engine, form)}")
        memory.check()
    except ServerError as error:
        problems.append(str(error))


def _ranges(numbers: Sequence[int]) -> str:
    """As in 0-2,5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        text = path.read_text(encoding="ascii")
    except OSError:
        return "unknown"
    return text[text.index("[") + 1 : text.index("]")] if "[" in text else text.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
