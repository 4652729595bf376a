"""Freed memory is kept, or given back: measured in processes of their own, since the heap is the process's."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from kvcache.allocator import keep_freed_memory

def transfer():  # eight chunks of 1 MiB under way, then none
    chunks = [bytearray(b"x") * (1 << 20) for _ in range(8)]

if sys.argv[1] == "keep":
    keep_freed_memory()
transfer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):
    transfer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_chunks_of_a_mebibyte_are_not_faulted_in_anew_each_time() -> None:
    assert faults("keep") < 256  # the pages of one chunk; 16 transfers touch 32,768


RELEASE = """
import sys
import psutil
from kvcache.allocator import give_back_freed_memory, keep_freed_memory

keep_freed_memory()
chunks = [bytearray(b"x") * (1 << 20) for _ in range(160)]
del chunks[:-1]  # the last one keeps the end of the heap where it is
if sys.argv[1] == "give back":
    give_back_freed_memory()
print(psutil.Process().memory_info().rss >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is glibc's")
def test_memory_freed_within_the_heap_is_given_back_when_asked() -> None:
    kept, left = (
        int(subprocess.run([sys.executable, "-c", RELEASE, how], check=True, capture_output=True, text=True).stdout)
        for how in ("keep", "give back")
    )
    assert kept - left > 140


def faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True).stdout)
