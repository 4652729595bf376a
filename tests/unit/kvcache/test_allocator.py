"""Freed memory is kept: measured in a process of its own, since the setting is the process's."""

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


def faults(how: str) -> int:
    return int(subprocess.run([sys.executable, "-c", SCRIPT, how], check=True, capture_output=True, text=True).stdout)
