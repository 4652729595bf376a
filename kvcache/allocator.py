"""How the C allocator treats memory that was just freed, in processes that move large chunks all the time."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc, malloc.h
KEEP_BYTES = 128 << 20
LARGEST_BYTES = 32 << 20


def keep_freed_memory() -> None:
    """Reuse freed memory of up to 128 MiB rather than give it back to the kernel at once. Linux with glibc only.

    By default glibc maps each allocation above 128 KiB anew, and its first use faults every page in: for 1 MiB
    chunks that took as long as moving them (a get of 16 MiB through the broker: 25 ms before, 16 ms after).
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, LARGEST_BYTES)
        mallopt(_TRIM_THRESHOLD, KEEP_BYTES)


def give_back_freed_memory() -> None:
    """Return what is free inside the heap to the kernel, once, after much was freed. Linux with glibc only."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
