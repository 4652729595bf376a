"""Children that must not outlive the process that started them, not even if it is killed (Linux; else nothing)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from functools import partial

PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)  # looked up before any fork: only calls are safe between fork and exec


def die_with_us(number: signal.Signals) -> Callable[[], None] | None:
    """For `preexec_fn`: the child gets this signal when the thread that starts it ends. A stopped one needs SIGKILL."""
    return partial(_ask, os.getpid(), number) if sys.platform == "linux" else None


def _ask(parent_pid: int, number: signal.Signals) -> None:
    _libc.prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:
        os._exit(1)  # it ended before we could ask
