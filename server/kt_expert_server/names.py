"""Names that clients choose: of runs and of checkpoints."""

from __future__ import annotations

import re

from kt_expert_server.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(kind: str, name: str) -> str:
    """Raises InvalidRequest for anything that could be a path or would not print well."""
    if _NAME.fullmatch(name) is None:
        raise InvalidRequest(
            f"{kind} name {name!r} is not allowed; use 1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit"
        )
    return name
