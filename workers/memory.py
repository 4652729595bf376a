"""One preallocated region of bytes, and how the KV store reaches it. It never moves and never grows."""

from __future__ import annotations

import mmap

import numpy as np

from bus.errors import NoSpace


class HostMemory:
    """Main memory, aligned to the operating system's page. Offsets are in bytes; ranges must lie inside.

    Raises ValueError for a size below 1, NoSpace for more than the operating system gives.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 1:
            raise ValueError(f"a memory region needs at least 1 byte, not {nbytes}")
        self.nbytes = nbytes
        try:
            padded = np.empty(nbytes + mmap.PAGESIZE, dtype=np.uint8)
        except MemoryError:
            raise NoSpace(
                f"this machine has no {nbytes} bytes for the KV plane; give it less: --kv-plane-bytes"
            ) from None
        start = -padded.ctypes.data % mmap.PAGESIZE
        self._view = padded[start : start + nbytes].data

    def write(self, offset: int, data: memoryview) -> None:
        """Copy `data` (contiguous, format "B") to `offset`."""
        self._view[offset : offset + len(data)] = data

    def read(self, offset: int, nbytes: int) -> memoryview:
        """A read-only window on the bytes at `offset`, not a copy: what is written there later shows through."""
        return self._view[offset : offset + nbytes].toreadonly()
