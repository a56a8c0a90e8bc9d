"""How the host's memory is handed out: what a step frees stays with the process for the next one."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_LARGEST_THRESHOLD = 32 * 2**20  # that glibc accepts


def keep_freed_memory(most: int | None = None) -> bool:
    """Let this process keep freed memory instead of returning it to the system; whether the C library can.

    glibc gives large blocks back as soon as they are freed. A training step frees and asks for the same gigabytes again
    and again, and each time the kernel fills every page with zeros first: half of a step's time on a CPU
    (benchmarks/LOG.md). What the process holds at most hardly changes, but it holds it until it ends.

    Args:
        most: bytes; with it, blocks of 32 MiB and larger go back still, and so does what is free beyond it: for a
            process that now and then needs far more than usually.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library, with habits of its own
        return False
    if most is None:
        return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)) and bool(mallopt(_M_TRIM_THRESHOLD, most))
