"""Starts a training program that has no place for an import: `python -m kt_expert_client.launch --server HOST:PORT -- COMMAND`.

Every Python process of the command, and of what it starts in turn (torchrun, accelerate), offloads the models it loads.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kt_expert_client.start import SERVER_VARIABLE

AUTOLOAD = Path(__file__).parent / "autoload"


def environment_for(server: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment the command is started in."""
    search = [str(AUTOLOAD), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, SERVER_VARIABLE: server, "PYTHONPATH": os.pathsep.join(search)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Becomes the command. Exits with 2 and a sentence where there is none, or no server."""
    parser = argparse.ArgumentParser(prog="python -m kt_expert_client.launch", description=__doc__)
    parser.add_argument("--server", default=os.environ.get(SERVER_VARIABLE, ""), help=f"default: {SERVER_VARIABLE}")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to start, after --")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not options.server:
        parser.error(f"no server: give --server HOST:PORT, or set {SERVER_VARIABLE}")
    if not command:
        parser.error("no command: give what to start after --, as in `-- llamafactory-cli train recipe.yaml`")
    try:
        os.execvpe(command[0], command, environment_for(options.server, os.environ))  # noqa: S606  # the user's own command
    except FileNotFoundError:
        parser.error(f"there is no command {command[0]!r}")


if __name__ == "__main__":
    main(sys.argv[1:])
