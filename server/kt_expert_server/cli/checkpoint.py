"""kt-expert checkpoint: what lies in a server's state directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from kt_expert_server.checkpoints.filesystem import LocalFilesystem
from kt_expert_server.checkpoints.store import CheckpointStore
from kt_expert_server.errors import InvalidRequest, ServerError
from kt_expert_server.model.memory_plan import format_bytes
from kt_expert_server.names import check_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state-dir", required=True, type=Path, metavar="DIR", help="the server's --state-dir")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("ls", help="list them")
    for name, text in (("verify", "read every file and compare its digest"), ("rm", "remove them")):
        action = actions.add_parser(name, help=text)
        action.add_argument("names", nargs="*" if name == "verify" else "+", metavar="NAME")


def run(options: argparse.Namespace) -> int:
    """1 where a checkpoint is damaged."""
    if not options.state_dir.is_dir():
        raise InvalidRequest(f"--state-dir {options.state_dir} is not a directory")
    store = CheckpointStore(LocalFilesystem(options.state_dir))
    match options.action:
        case "ls":
            return _list(store)
        case "verify":
            return _verify(store, options.names or store.names())
    for name in options.names:
        store.remove(check_name("checkpoint", name))
        print(f"removed {name}")
    return 0


def _list(store: CheckpointStore) -> int:
    for name in store.names():
        try:
            manifest = store.manifest(name)
        except ServerError as error:
            print(f"{name}: {error}")
            continue
        kind = "automatic" if manifest.automatic else "saved by its trainer"
        print(f"{name}: run {manifest.run}, step {manifest.step}, {format_bytes(manifest.size_bytes)}, {kind}")
    return 0


def _verify(store: CheckpointStore, names: list[str]) -> int:
    damaged = 0
    for name in names:
        try:
            _, tensors = store.read(check_name("checkpoint", name))
            print(f"{name}: whole, {len(tensors)} tensors")
        except ServerError as error:
            damaged = 1
            print(f"{name}: {error}")
    return damaged
