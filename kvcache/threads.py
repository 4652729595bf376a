"""How this machine's cores are shared out among the workers that we start on it."""

from __future__ import annotations

import os


def threads_per_worker(num_workers: int) -> int:
    """Threads of a model step, for each of so many workers: more than there are cores only wait for each other.

    On two busy cores, a step of two workers with two threads each took ten times as long as with one thread each.
    """
    return max(1, (os.cpu_count() or 1) // num_workers)
