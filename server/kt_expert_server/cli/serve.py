"""kt-expert-server: the daemon."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kt_expert_server.config import (
    DEFAULT_LISTEN,
    DEFAULT_METRICS_LISTEN,
    ISA_VARIABLE,
    SERVED_FORMATS,
    Address,
    ServerConfig,
    available_cores,
    available_memory,
)
from kt_expert_server.errors import InvalidRequest, ServerError
from kt_expert_server.model.index import ModelPlan, plan_model
from kt_expert_server.model.loader import AUTO_FORMAT, shown_format
from kt_expert_server.model.memory_plan import plan_memory
from kt_expert_server.model.placement import AUTO, choose_placement
from kt_expert_server.server import Server

_GIB = 1024**3
_DEFAULT_SHUTDOWN_TIMEOUT_S = 60.0
_PLAIN_REPORTS = 10  # lines a load prints where there is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the process's exit status: 0 after a clean stop, an error's own status otherwise."""
    options = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    try:
        config = _config(options)
        plan = plan_model(config.model_dir)
        _print_plan(plan, config)
        uvloop.run(_serve(config, plan))
    except ServerError as error:
        print(f"kt-expert-server: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"kt-expert-server: {error}", file=sys.stderr)
        return ServerError.exit_status
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kt-expert-server", description="Serve the experts of a MoE checkpoint.")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="checkpoint with safetensors files")
    parser.add_argument("--listen", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="gRPC address (port 0: a free one)")
    parser.add_argument("--metrics-listen", default=DEFAULT_METRICS_LISTEN, metavar="HOST:PORT", help="HTTP address")
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="where checkpoints are kept; none without it")
    parser.add_argument("--threads", type=int, metavar="N", help="engine threads (default: all cores of this process)")
    parser.add_argument(
        "--nodes", default=AUTO, metavar="N", help="memory nodes to split weights and threads over (default: the machine's)"
    )
    parser.add_argument(
        "--weight-format",
        default=AUTO_FORMAT,
        choices=SERVED_FORMATS,
        help="format resident in memory (default: the checkpoint's own)",
    )
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="limit of all reservations (default: cgroup's)")
    parser.add_argument(
        "--shutdown-timeout", type=float, default=_DEFAULT_SHUTDOWN_TIMEOUT_S, metavar="S", help="time to finish work"
    )
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def _config(options: argparse.Namespace) -> ServerConfig:
    for name, value in (("--memory-limit", options.memory_limit), ("--shutdown-timeout", options.shutdown_timeout)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InvalidRequest(f"{name} is {value}, expected a number of at least 0")
    limit = available_memory() if options.memory_limit is None else int(options.memory_limit * _GIB)
    threads = available_cores() if options.threads is None else options.threads
    return ServerConfig(
        model_dir=options.model,
        listen=Address.parse(options.listen),
        metrics_listen=Address.parse(options.metrics_listen),
        state_dir=options.state_dir,
        threads=threads,
        placement=choose_placement(options.nodes, threads),
        weight_format=options.weight_format,
        isa=os.environ.get(ISA_VARIABLE, ""),
        memory_limit_bytes=limit,
        shutdown_timeout_s=options.shutdown_timeout,
    )


def _print_plan(plan: ModelPlan, config: ServerConfig) -> None:
    memory = plan_memory(plan, config.weight_format, config.memory_limit_bytes, config.placement.nodes)
    first = plan.layers[0]
    print(
        f"{plan.model_type}: {len(plan.layers)} MoE layers, {first.num_experts} experts of {first.hidden_size} x "
        f"{first.intermediate_size}, top-{first.top_k}, format {shown_format(plan, config.weight_format)}, "
        f"{config.placement.describe()}",
        file=sys.stderr,
    )
    for line in memory.lines(config.threads):
        print(line, file=sys.stderr)
    memory.check()


async def _serve(config: ServerConfig, plan: ModelPlan) -> None:
    server = Server(config, plan)
    with _LoadProgress(plan.bf16_bytes) as progress:

        def on_ready(grpc_address: Address, metrics_address: Address) -> None:
            progress.finish()
            print(f"ready grpc={grpc_address} metrics={metrics_address}", flush=True)

        await server.run(progress.advance, on_ready)


class _LoadProgress:
    """A bar on a terminal, ten plain lines in a log."""

    def __init__(self, total_bytes: int) -> None:
        self._total = max(1, total_bytes)
        self._done = self._reported = 0
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("loading experts"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("load", total=total_bytes)

    def __enter__(self) -> _LoadProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()

    def advance(self, size_bytes: int) -> None:
        self._done += size_bytes
        if self._bar is not None:
            self._bar.advance(self._task, size_bytes)
        elif self._done * _PLAIN_REPORTS // self._total > self._reported:
            self._reported = self._done * _PLAIN_REPORTS // self._total
            print(f"loading experts: {100 * self._done // self._total} %", file=sys.stderr, flush=True)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


if __name__ == "__main__":
    sys.exit(main())
