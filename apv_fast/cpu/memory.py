"""Keep the memory of freed tensors for the next ones.

An update frees and allocates the same few hundred megabytes again and again. By default glibc takes blocks that are
larger than some megabytes from the kernel and returns them, and the kernel clears every page again before it hands it
out: a quarter of a pre-training update on a CPU, measured (docs/notes/2026-11-cpu-scan.md). The price: a process keeps
the largest amount that it ever used, so this is for programs, which call it once, and not for importing a library.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_GROWTH = 64 * 2**20  # bytes that the heap grows by at least


def keep_freed_memory() -> bool:
    """Tell the C library not to return freed memory to the system; whether it could be told (glibc only)."""
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _GROWTH))
    return all([mallopt(name, value) == 1 for name, value in settings])
