"""kt-expert runs: the runs of a server, seen and closed from the command line."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import grpc
from kt_expert_proto.channel import CLIENT_OPTIONS
from kt_expert_proto.v1 import service_pb2 as pb
from kt_expert_proto.v1 import service_pb2_grpc

from kt_expert_server.config import DEFAULT_LISTEN
from kt_expert_server.errors import InvalidRequest, NotFound, NotPermitted, ServerError, ServerUnavailable
from kt_expert_server.model.memory_plan import format_bytes

_TIMEOUT_S = 10.0
_ERRORS: dict[grpc.StatusCode, type[ServerError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.PERMISSION_DENIED: NotPermitted,
    grpc.StatusCode.UNAUTHENTICATED: NotPermitted,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server", default=DEFAULT_LISTEN, metavar="HOST:PORT", help="the server's gRPC address, or unix:/path"
    )
    parser.add_argument("--ca", type=Path, metavar="FILE", help="speak TLS, and trust what this authority has signed")
    parser.add_argument("--token-file", type=Path, metavar="FILE", help="default: KT_EXPERT_TOKEN_FILE")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("ls", help="list them")
    close = actions.add_parser("close", help="end runs, whoever is in them, and give their memory back; checkpoints stay")
    close.add_argument("names", nargs="+", metavar="RUN")


def run(options: argparse.Namespace) -> int:
    with _channel(options) as channel:
        stub = service_pb2_grpc.ExpertStub(channel)
        try:
            if options.action == "ls":
                _list(stub.GetStatus(pb.GetStatusRequest(), timeout=_TIMEOUT_S, metadata=_metadata(options)))
            else:
                for name in options.names:
                    stub.CloseRun(pb.CloseRunRequest(run=name), timeout=_TIMEOUT_S, metadata=_metadata(options))
                    print(f"closed {name}")
        except grpc.RpcError as error:
            call: Any = error
            raise _ERRORS.get(call.code(), ServerUnavailable)(f"{options.server}: {call.details()}") from error
    return 0


def _list(status: pb.GetStatusResponse) -> None:
    if not status.runs:
        print("no runs are open")
    for each in status.runs:
        connected = sum(member.connected for member in each.members)
        waiting = "" if each.members else f", idle for {each.idle_s:.0f} s"
        kind = "ephemeral" if each.ephemeral else "named"
        print(
            f"{each.run}: step {each.step}, {connected} of {each.world_size} ranks connected{waiting}, "
            f"{format_bytes(each.memory_bytes)}, {kind}"
        )


def _channel(options: argparse.Namespace) -> grpc.Channel:
    if options.ca is None:
        return grpc.insecure_channel(options.server, options=CLIENT_OPTIONS)
    return grpc.secure_channel(options.server, grpc.ssl_channel_credentials(_read(options.ca)), options=CLIENT_OPTIONS)


def _metadata(options: argparse.Namespace) -> tuple[tuple[str, str], ...]:
    path = options.token_file or (Path(os.environ["KT_EXPERT_TOKEN_FILE"]) if os.environ.get("KT_EXPERT_TOKEN_FILE") else None)
    return () if path is None else (("authorization", f"Bearer {_read(path).decode().strip()}"),)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
