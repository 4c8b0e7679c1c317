"""Memory that was freed and that malloc still holds: between two layers' matrices it keeps pieces that are too small for the
next, so that an injection would grow by one of them with every layer."""

from __future__ import annotations

import ctypes
import functools

_WORTH_BYTES = 1024 * 1024  # of smaller matrices nothing is to be seen


def give_back(size_bytes: int) -> None:
    """To the system, after something of that size was freed. Does nothing where the C library has no such call."""
    if size_bytes >= _WORTH_BYTES:
        trim = _trim()
        if trim is not None:
            trim(0)


@functools.cache
def _trim() -> ctypes._NamedFuncPointer | None:
    try:
        found: ctypes._NamedFuncPointer = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    return found
