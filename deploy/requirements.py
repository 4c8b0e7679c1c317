"""Prints the packages pyproject.toml asks for, one a line: ``requirements.py GROUP...``, with `build` for the build's.

Extras that name the project's own extras are followed, so that everything can be installed before the project is built.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_OWN = re.compile(r"kt-expert\[([\w,-]+)\]")


def requirements(project: dict[str, object], extra: str) -> list[str]:
    """Requirements of one extra, own extras expanded. Raises KeyError for an unknown one."""
    optional = project["optional-dependencies"]
    if not isinstance(optional, dict):
        raise TypeError("optional-dependencies in pyproject.toml is not a table")
    found: list[str] = []
    for requirement in optional[extra]:
        own = _OWN.fullmatch(requirement)
        if own is None:
            found.append(requirement)
        else:
            for name in own[1].split(","):
                found += requirements(project, name)
    return found


def main() -> None:
    document = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    lines = list(document["project"]["dependencies"])
    for group in sys.argv[1:]:
        lines += document["build-system"]["requires"] if group == "build" else requirements(document["project"], group)
    print("\n".join(dict.fromkeys(lines)))  # noqa: T201  # its output


if __name__ == "__main__":
    main()
