"""kt-expert: what an operator runs beside the daemon."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kt_expert_server.cli import bench, checkpoint, doctor, runs, trace
from kt_expert_server.config import SERVED_FORMATS, available_cores, available_memory
from kt_expert_server.errors import ServerError
from kt_expert_server.model.index import plan_model
from kt_expert_server.model.loader import AUTO_FORMAT
from kt_expert_server.model.memory_plan import plan_memory
from kt_expert_server.model.placement import choose_placement

_GIB = 1024**3


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the process's exit status."""
    options = _parser().parse_args(argv)
    try:
        status: int = options.run(options)
    except ServerError as error:
        print(f"kt-expert: {error}", file=sys.stderr)
        return error.exit_status
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kt-expert", description="Tools for kt-expert-server.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    doctor_parser = commands.add_parser("doctor", help="what this machine can do and what would be in the way")
    doctor_parser.add_argument("--model", type=Path, metavar="DIR", help="also check a checkpoint")
    doctor_parser.set_defaults(run=doctor.run)
    plan_parser = commands.add_parser("plan", help="memory a checkpoint needs, without loading it")
    plan_parser.add_argument("--model", type=Path, metavar="DIR", required=True)
    plan_parser.add_argument("--weight-format", default=AUTO_FORMAT, choices=SERVED_FORMATS)
    plan_parser.add_argument(
        "--nodes", default="1", metavar="N", help="memory nodes to cut the weights for, or auto (default: 1)"
    )
    plan_parser.add_argument("--memory-limit", type=float, metavar="GIB")
    plan_parser.set_defaults(run=_plan)
    runs_parser = commands.add_parser("runs", help="list and close the runs of a server")
    runs.add_arguments(runs_parser)
    runs_parser.set_defaults(run=runs.run)
    checkpoint_parser = commands.add_parser("checkpoint", help="list, verify and remove checkpoints")
    checkpoint.add_arguments(checkpoint_parser)
    checkpoint_parser.set_defaults(run=checkpoint.run)
    bench_parser = commands.add_parser("bench", help="measure the engine on this machine")
    bench.add_arguments(bench_parser)
    bench_parser.set_defaults(run=bench.run)
    trace_parser = commands.add_parser(
        "trace", help="run a training and draw its calls", description=trace.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    trace.add_arguments(trace_parser)
    trace_parser.set_defaults(run=trace.run)
    return parser


def _plan(options: argparse.Namespace) -> int:
    plan = plan_model(options.model)
    limit = available_memory() if options.memory_limit is None else int(options.memory_limit * _GIB)
    placement = choose_placement(options.nodes, available_cores())
    memory = plan_memory(plan, options.weight_format, limit, placement.nodes)
    print(f"{plan.model_type}, {len(plan.layers)} MoE layers, digest {plan.digest[:16]}")
    print("\n".join(memory.lines(threads=1)))
    memory.check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
