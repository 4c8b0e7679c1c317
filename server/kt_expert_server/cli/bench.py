"""kt-expert bench: one MoE layer on this machine beside its bounds and its peers.

`kernels` runs forward and backward, `optimizer` the update of the layer's LoRA, `memory` shows what the process holds,
`trainer` what a trainer of DeepSeek-V3 pays on its own side, with a server that holds shapes only, `remote` what a call to a
server costs beside the same call of the engine in one process, `tenants` what several runs get together beside one,
`transport` what carrying tensors costs beside raw sockets, `pool` what the engine's threads cost a loop, and `step` what a
whole training step is made of.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import kt_expert_native as native
from rich.console import Console

from kt_expert_server.bench.kernels import Plan, measure
from kt_expert_server.bench.memory import measure_memory, memory_as_json, print_memory
from kt_expert_server.bench.optimizer import measure_optimizers, print_optimizers
from kt_expert_server.bench.peers import KtKernel, Peer, TorchLoop, TorchWeights
from kt_expert_server.bench.pool import measure_pool, plot_pool, pool_as_json, print_pool
from kt_expert_server.bench.remote import cases, measure_remote, plot_remote, print_remote, remote_as_json
from kt_expert_server.bench.report import print_rows, write_plot
from kt_expert_server.bench.shapes import PUBLISHED, LayerShape, parse_shape
from kt_expert_server.bench.step import StepCase, measure_step, plot_step, print_step
from kt_expert_server.bench.tenants import measure_tenants, plot_tenants, print_tenants, tenants_as_json
from kt_expert_server.bench.trainer import measure_trainer, print_trainer
from kt_expert_server.bench.transport import measure_transport, plot_transport, print_transport, transport_as_json
from kt_expert_server.config import ISA_VARIABLE, WEIGHT_FORMATS, available_cores, available_memory
from kt_expert_server.errors import InvalidRequest
from kt_expert_server.model.placement import AUTO, choose_placement

PEERS = ("torch", "kt-kernel")
_FP32_OVER_BF16 = 2
_FP32_BYTES = 4
_OPTIMIZER_SETS = 4  # parameters, gradients and at most two moments
_FILE_WIDTH = 140  # of tables that do not go to a terminal
_TRAINER_LAYERS, _STEP_LAYERS = 61, 2
_MEMORY_SHARE = 0.6  # of what this process may use, for weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=("kernels", "optimizer", "memory", "trainer", "remote", "tenants", "transport", "pool", "step")
    )
    parser.add_argument("--shape", default="qwen3-30b-a3b", help=f"{', '.join(PUBLISHED)}, a model directory, or E,H,I,k")
    parser.add_argument("--tokens", help="batch sizes, separated by commas (default: 1,16,128,2048; of memory 512)")
    parser.add_argument("--rank", help="LoRA ranks, separated by commas; 0 is none (default: 0,16; else 16)")
    parser.add_argument("--format", default="bf16", help=f"of {', '.join(WEIGHT_FORMATS)}; or all")
    parser.add_argument("--against", default="", help=f"peers to run beside: {', '.join(PEERS)}")
    parser.add_argument("--kt-kernel-python", metavar="PYTHON", help="a Python that has kt-kernel")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--nodes", default=AUTO, metavar="N", help="memory nodes, as for kt-expert-server")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, help="of bench trainer (default 61, DeepSeek-V3's) and bench step (default 2)")
    parser.add_argument("--experts", type=int, default=256, help="of bench trainer: in each layer")
    parser.add_argument("--shared", type=int, default=0, metavar="N", help="of bench step: shared experts")
    parser.add_argument("--device", default="cpu", help="of bench step: the trainer's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them (.png, .svg, .pdf)")


def run(options: argparse.Namespace) -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    if options.what in _OF_SERVERS:
        return _OF_SERVERS[options.what](console, options)
    return _run_engine(console, options)


def _run_engine(console: Console, options: argparse.Namespace) -> int:
    asked = parse_shape(options.shape)
    is_kernels = options.what == "kernels"
    options.tokens = _numbers(options.tokens or ("1,16,128,2048" if is_kernels else "512"), "--tokens", 1)
    options.rank = _numbers(options.rank or ("0,16" if is_kernels else "16"), "--rank", 0)
    if options.repeats < 1 or options.threads < 1:
        raise InvalidRequest(f"--repeats {options.repeats} and --threads {options.threads} must be at least 1")
    if options.what == "optimizer":
        return _run_optimizers(console, asked, options)
    if options.what == "memory":
        return _run_memory(console, asked, options)
    formats = WEIGHT_FORMATS if options.format == "all" else tuple(options.format.split(","))
    peer_names = [name for name in options.against.split(",") if name]
    _validate(formats, peer_names, options)
    shape = _that_fits(asked, formats, peer_names)
    placement = choose_placement(options.nodes, options.threads)
    plan = Plan(shape, options.tokens, options.rank, formats, options.repeats, placement)
    engine = placement.engine(options.threads, os.environ.get(ISA_VARIABLE, ""))
    console.print(
        f"{shape.name}: E={shape.experts} H={shape.hidden} I={shape.intermediate} k={shape.top_k}, "
        f"{', '.join(dict.fromkeys(engine.kernel(name) for name in formats))} on {engine.threads} threads"
    )
    _say_what_fits(console, asked, shape, "routes are drawn from those, more rows each")
    peers = _peers(peer_names, plan, options)
    try:
        columns = [*dict.fromkeys(peer.name for peer in peers), *(["bf16"] if "bf16" in formats and len(formats) > 1 else [])]
        report = measure(plan, engine, peers, lambda rows: print_rows(console, rows, peers=columns))
    finally:
        for peer in peers:
            peer.close()
    console.print(f"multiply-add peak {report.fma_peak_gflops:.1f} GFLOP/s, reading {report.read_gbs:.1f} GB/s, same run")
    _write_json(options.json, report.as_json())
    if options.plot is not None:
        write_plot(report, options.plot)
    return 0


def _run_optimizers(console: Console, shape: LayerShape, options: argparse.Namespace) -> int:
    if 0 in options.rank:
        raise InvalidRequest("bench optimizer updates LoRA; give --rank without 0")
    placement = choose_placement(options.nodes, options.threads)
    engine = placement.engine(options.threads, os.environ.get(ISA_VARIABLE, ""))
    of_rank = max(options.rank) * 3 * (shape.hidden + shape.intermediate) * _FP32_BYTES
    fitting = _limited(shape, of_rank * _OPTIMIZER_SETS)
    _say_what_fits(console, shape, fitting, "the adapter is of those")
    report = measure_optimizers(engine, fitting, options.rank, options.repeats)
    print_optimizers(console, report)
    _write_json(options.json, report.as_json())
    return 0


def _run_memory(console: Console, shape: LayerShape, options: argparse.Namespace) -> int:
    _validate((options.format,), [], options)
    if len(options.tokens) > 1 or len(options.rank) > 1:
        raise InvalidRequest("bench memory measures one case a process; give one of --tokens and one --rank")
    placement = choose_placement(options.nodes, options.threads)
    engine = placement.engine(options.threads, os.environ.get(ISA_VARIABLE, ""))
    fitting = _that_fits(shape, (options.format,), [])
    _say_what_fits(console, shape, fitting, "routes are drawn from those, more rows each")
    row = measure_memory(engine, fitting, options.format, options.tokens[0], options.rank[0], placement)
    print_memory(console, row)
    _write_json(options.json, memory_as_json([row]))
    return 0


def _run_trainer(console: Console, options: argparse.Namespace) -> int:
    (rank,) = _numbers(options.rank or "16", "--rank", 1)[:1]
    found = measure_trainer(options.layers or _TRAINER_LAYERS, options.experts, rank, options.repeats)
    print_trainer(console, found)
    _write_json(options.json, {"trainer": found})
    return 0


def _run_transport(console: Console, options: argparse.Namespace) -> int:
    found = measure_transport(options.repeats)
    print_transport(console, found)
    _keep(options, {"transport": transport_as_json(found)}, lambda path: plot_transport(found, path))
    return 0


def _run_step(console: Console, options: argparse.Namespace) -> int:
    (tokens,) = _numbers(options.tokens or "1024", "--tokens", 1)[:1]
    layers = options.layers or _STEP_LAYERS
    if layers < 1 or options.shared < 0 or options.repeats < 1 or options.threads < 1:
        raise InvalidRequest("--layers, --repeats and --threads must be at least 1, --shared at least 0")
    torch_threads = max(1, available_cores() - options.threads)
    shape = parse_shape(options.shape)
    case = StepCase(
        shape, layers, tokens, options.shared, options.threads, torch_threads, options.repeats, options.device
    )  # fmt: skip
    console.print(
        f"{layers} layers of {shape.name}, {tokens} tokens, trainer on {options.device} with {torch_threads} threads, "
        f"engine with {options.threads}"
    )
    found = measure_step(case)
    print_step(console, found)
    _keep(options, {"step": found}, lambda path: plot_step(found, path))
    return 0


def _run_pool(console: Console, options: argparse.Namespace) -> int:
    cores = available_cores()
    rows = measure_pool(cores)
    print_pool(console, rows, cores)
    _keep(options, {"pool": pool_as_json(rows)}, lambda path: plot_pool(rows, path))
    return 0


def _run_tenants(console: Console, options: argparse.Namespace) -> int:
    found = measure_tenants(options.threads, options.repeats)
    print_tenants(console, found)
    _keep(options, {"tenants": tenants_as_json(found)}, lambda path: plot_tenants(found, path))
    return 0


def _run_remote(console: Console, options: argparse.Namespace) -> int:
    found = measure_remote(cases(options.threads), options.repeats)
    print_remote(console, found)
    _keep(options, {"remote": remote_as_json(found)}, lambda path: plot_remote(found, path))
    return 0


def _say_what_fits(console: Console, asked: LayerShape, fitting: LayerShape, then: str) -> None:
    if fitting.experts < asked.experts:
        console.print(f"memory holds {fitting.experts} of {asked.experts} experts: {then}")


def _keep(options: argparse.Namespace, content: dict[str, object], plot: Callable[[Path], None]) -> None:
    """What --json and --plot ask for."""
    _write_json(options.json, content)
    if options.plot is not None:
        plot(options.plot)


def _write_json(path: Path | None, content: dict[str, object]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _numbers(text: str, option: str, least: int) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) >= least for part in parts):
        raise InvalidRequest(f"{option} {text!r} is not a list of numbers of at least {least}")
    return tuple(int(part) for part in parts)


def _validate(formats: tuple[str, ...], peers: list[str], options: argparse.Namespace) -> None:
    for name in formats:
        if name not in WEIGHT_FORMATS:
            raise InvalidRequest(f"weight format {name!r} is not available; choose among {', '.join(WEIGHT_FORMATS)}, or all")
    for name in peers:
        if name not in PEERS:
            raise InvalidRequest(f"peer {name!r} is not known; choose among {', '.join(PEERS)}")
    if "kt-kernel" in peers and options.kt_kernel_python is None:
        raise InvalidRequest("--against kt-kernel needs --kt-kernel-python, a Python that has it")


def _that_fits(shape: LayerShape, formats: tuple[str, ...], peers: list[str]) -> LayerShape:
    """The shape with as many experts as memory holds in all formats and in the peers' own copies."""
    one = native.LayerSpec(1, shape.hidden, shape.intermediate)
    per_expert = sum(native.LayerWeights.nbytes_of(one, name) for name in formats)
    bf16 = native.LayerWeights.nbytes_of(one, "bf16")
    # torch stacks its copy from single matrices, kt-kernel packs a second one: both pass through twice their size.
    per_expert += sum(2 * _FP32_OVER_BF16 * bf16 if name == "torch" else 2 * bf16 for name in peers)
    return _limited(shape, per_expert)


def _limited(shape: LayerShape, per_expert: int) -> LayerShape:
    fitting = int(available_memory() * _MEMORY_SHARE) // per_expert
    if fitting < shape.top_k:
        raise InvalidRequest(f"memory holds {fitting} experts of {shape.name}, fewer than a token's {shape.top_k}")
    return replace(shape, experts=min(shape.experts, fitting))


def _peers(names: list[str], plan: Plan, options: argparse.Namespace) -> list[Peer]:
    peers: list[Peer] = []
    if "torch" in names:
        weights = TorchWeights(plan.shape, options.threads)
        peers += [TorchLoop(weights, rank) for rank in sorted({0, *plan.ranks})]
    if "kt-kernel" in names:
        peers.append(KtKernel(plan.shape, options.threads, options.kt_kernel_python, max(plan.tokens)))
    return peers


# Those that are not about one layer of the engine in this process.
_OF_SERVERS: dict[str, Callable[[Console, argparse.Namespace], int]] = {
    "trainer": _run_trainer,
    "remote": _run_remote,
    "tenants": _run_tenants,
    "transport": _run_transport,
    "pool": _run_pool,
    "step": _run_step,
}
