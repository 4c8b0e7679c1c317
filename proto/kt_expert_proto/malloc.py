"""What the C library does with memory that messages leave behind.

A stream's messages have a mebibyte. glibc gives freed memory at the end of its heap back to the system beyond a few mebibytes,
so that each tensor pays for fresh pages again: with 32 MiB each way, up to a fifth of a call's time.
"""

from __future__ import annotations

import ctypes
import functools
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_KEPT_BYTES = 256 * 1024 * 1024  # at the end of the heap: what two large tensors each way leave
_PAD_BYTES = 16 * 1024 * 1024  # by which the heap grows
_OWN_MAPPING_BYTES = 32 * 1024 * 1024  # the most that glibc would come to by itself; setting any of these ends that
# Of struct mallinfo2, as malloc.h of glibc 2.33 and later has it: ten of size_t, of which are bytes
_MALLINFO_FIELDS, _MAPPED_BYTES, _HEAP_BYTES = 10, 4, 7
_CHOSEN_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


@functools.cache
def keep_freed_memory() -> bool:
    """Has glibc keep what messages leave behind, for the next ones. False where it is another C library, or where the user has
    chosen otherwise (MALLOC_TRIM_THRESHOLD_ and its like, or GLIBC_TUNABLES)."""
    if any(name in os.environ for name in _CHOSEN_BY_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    wanted = ((_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, _PAD_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in wanted)


class _MallInfo(ctypes.Structure):
    _fields_ = (("values", ctypes.c_size_t * _MALLINFO_FIELDS),)


def bytes_in_use() -> int | None:
    """What this process has taken from the C library and not given back, in all of its heaps. Resident memory is more: what was
    freed and is kept. None where the C library does not say (glibc before 2.33, or another one)."""
    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo.restype = _MallInfo
    values = mallinfo().values
    return int(values[_MAPPED_BYTES] + values[_HEAP_BYTES])
