"""kt-expert-server: the daemon."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import resource
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import uvloop
from kt_expert_proto.environment import unknown_variable
from kt_expert_proto.malloc import keep_freed_memory
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from kt_expert_server.config import (
    DEFAULT_CALLS_PER_SECOND,
    DEFAULT_LIMITS,
    DEFAULT_LISTEN,
    DEFAULT_METRICS_LISTEN,
    ISA_VARIABLE,
    SERVED_FORMATS,
    Address,
    DataPlanePlace,
    SameHostPlace,
    Security,
    ServerConfig,
    available_cores,
    available_memory,
)
from kt_expert_server.engine.quotas import QUOTAS
from kt_expert_server.errors import InvalidRequest, ServerError
from kt_expert_server.members.limits import Limits
from kt_expert_server.model.index import ModelPlan, plan_model
from kt_expert_server.model.loader import AUTO_FORMAT, shown_format
from kt_expert_server.model.memory_plan import plan_memory
from kt_expert_server.model.placement import AUTO, choose_placement
from kt_expert_server.server import Server

_GIB = 1024**3
_EVERY = re.compile(r"(?P<number>\d{1,9})(?P<unit>s?)")
_QUOTA = re.compile(r"(?P<what>[a-z]+)=(?P<gib>\d{1,9}(\.\d{1,9})?)")
_DEFAULT_SHUTDOWN_TIMEOUT_S = 60.0
_OPEN_FILES = 4096  # a socket and some of gRPC's own for each of 256 streams and as many control calls, with room
_LEAST_OPEN_FILES = 128  # a model's files, gRPC's and those of a dozen trainers
_PLAIN_REPORTS = 10  # lines a load prints where there is no terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the process's exit status: 0 after a clean stop, an error's own status otherwise."""
    options = _parser().parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    try:
        _check_environment()
        keep_freed_memory()
        _raise_open_files()
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


def _check_environment() -> None:
    unknown = unknown_variable(os.environ)
    if unknown is not None:
        raise InvalidRequest(unknown)


def _raise_open_files() -> None:
    """As many open files as the system allows this process, up to what a full server needs. Raises InvalidRequest where that is
    too few: gRPC ends the process in the middle of work when it cannot open another one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < _LEAST_OPEN_FILES:
        raise InvalidRequest(
            f"this process may open {wanted} files, expected at least {_LEAST_OPEN_FILES}; raise the limit (ulimit -n "
            f"{_OPEN_FILES}, or LimitNOFILE= of the service)"
        )


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
    parser.add_argument(
        "--same-host",
        default="auto",
        metavar="DIR|auto|off",
        help="directory of the socket through which trainers on this host share memory with the server",
    )
    parser.add_argument(
        "--spin",
        type=int,
        default=0,
        metavar="US",
        help="microseconds to look for a small forward of a trainer on this host before sleeping",
    )
    parser.add_argument(
        "--data-listen",
        default="off",
        metavar="HOST:PORT|off",
        help="port beside gRPC for tensors of trainers on other hosts (port 0: a free one)",
    )
    parser.add_argument("--data-address", metavar="HOST:PORT", help="where trainers reach --data-listen, if that is elsewhere")
    _add_runs(parser)
    _add_security(parser)
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """What runs and their trainers may have, and for how long."""
    parser.add_argument(
        "--checkpoint-every",
        default="0",
        metavar="N|Ns",
        help="take a restart point of every run after N steps, or after N seconds (300s); 0: only when the server stops",
    )
    parser.add_argument(
        "--keep-checkpoints", type=int, default=DEFAULT_LIMITS.keep_checkpoints, metavar="K", help="restart points kept a run"
    )
    parser.add_argument(
        "--run-ttl",
        type=float,
        default=DEFAULT_LIMITS.run_ttl_s,
        metavar="S",
        help="close a named run that had no member for so long",
    )
    parser.add_argument(
        "--lease",
        type=float,
        default=DEFAULT_LIMITS.lease_s,
        metavar="S",
        help="how long a trainer without connection keeps its rank",
    )
    parser.add_argument(
        "--retention",
        type=float,
        default=DEFAULT_LIMITS.retention_s,
        metavar="S",
        help="how long after that its gradients and tickets are kept, unless the memory is needed",
    )
    parser.add_argument(
        "--quota",
        action="append",
        default=[],
        metavar="WHAT=GIB",
        help=f"what one identity may have, over all its runs, of {', '.join(QUOTAS)}; may be given for each",
    )
    parser.add_argument(
        "--calls-per-second",
        type=float,
        default=DEFAULT_CALLS_PER_SECOND,
        metavar="N",
        help="streams opened, control calls and refused requests of one identity; faster ones wait their turn",
    )


def _add_security(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security", "needed where --listen can be reached from other machines")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain (PEM); read again when it changes")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="its key (PEM)")
    group.add_argument("--tls-client-ca", type=Path, metavar="FILE", help="accept only clients whose certificate it has signed")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="lines of identity, scopes (train,admin) and token")
    group.add_argument("--insecure-allow-remote", action="store_true", help="listen on a network without TLS or tokens")
    group.add_argument("--reflection", action="store_true", help="describe the service outside loopback too")


def _security(options: argparse.Namespace) -> Security:
    return Security(
        options.tls_cert,
        options.tls_key,
        options.tls_client_ca,
        options.token_file,
        options.insecure_allow_remote,
        options.reflection,
    )


def _config(options: argparse.Namespace) -> ServerConfig:
    numbers = (
        ("--memory-limit", options.memory_limit),
        ("--shutdown-timeout", options.shutdown_timeout),
        ("--run-ttl", options.run_ttl),
        ("--lease", options.lease),
        ("--retention", options.retention),
    )
    for name, value in numbers:
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
        limits=_limits(options),
        security=_security(options),
        weight_format=options.weight_format,
        isa=os.environ.get(ISA_VARIABLE, ""),
        memory_limit_bytes=limit,
        shutdown_timeout_s=options.shutdown_timeout,
        calls_per_second=options.calls_per_second,
        same_host=SameHostPlace.parse(options.same_host, options.spin),
        data_plane=DataPlanePlace.parse(options.data_listen, options.data_address),
    )


def _limits(options: argparse.Namespace) -> Limits:
    """Raises InvalidRequest for restart points without a place, or numbers without a meaning."""
    match = _EVERY.fullmatch(options.checkpoint_every)
    if match is None:
        raise InvalidRequest(
            f"--checkpoint-every is {options.checkpoint_every!r}, expected a number of steps (10) or of seconds (300s)"
        )
    if options.keep_checkpoints < 1:
        raise InvalidRequest(f"--keep-checkpoints is {options.keep_checkpoints}, expected at least 1")
    every = int(match["number"])
    if every and options.state_dir is None:
        raise InvalidRequest("--checkpoint-every needs a place for checkpoints; give --state-dir DIR too")
    by_time = match["unit"] == "s"
    return replace(
        DEFAULT_LIMITS,
        checkpoint_every_steps=0 if by_time else every,
        checkpoint_every_s=float(every) if by_time else 0.0,
        keep_checkpoints=options.keep_checkpoints,
        run_ttl_s=options.run_ttl,
        lease_s=options.lease,
        retention_s=options.retention,
        quotas=_quotas(options.quota),
    )


def _quotas(given: list[str]) -> dict[str, int]:
    """Raises InvalidRequest for a name that is none, a size that is none, or one given twice."""
    quotas: dict[str, int] = {}
    for text in given:
        match = _QUOTA.fullmatch(text)
        if match is None or match["what"] not in QUOTAS or match["what"] in quotas:
            raise InvalidRequest(f"--quota is {text!r}, expected WHAT=GIB, once for each of {', '.join(QUOTAS)} (tickets=20)")
        quotas[match["what"]] = int(float(match["gib"]) * _GIB)
    return quotas


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

        def on_ready(grpc_address: Address, metrics_address: Address, data_address: Address | None) -> None:
            progress.finish()
            data = f" data={data_address}" if data_address is not None else ""
            print(f"ready grpc={grpc_address} metrics={metrics_address}{data}", flush=True)

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
