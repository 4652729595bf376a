"""Places where a test may have this process die, so that "just before the answer" is hit exactly and not by luck.

Off unless `KVCACHE_FAILPOINT` is set at start. The shell passes these points:

    worker.reply    before an answer within a call is sent
    worker.publish  before tokens are published
"""

from __future__ import annotations

import os
import signal


class Failpoint:
    """`NAME:kill9@N`: SIGKILL ourselves when point NAME is reached the Nth time. The form was checked by the config."""

    def __init__(self, text: str) -> None:
        self._name, _, action = text.partition(":")
        self._left = int(action.partition("@")[2])

    def reach(self, name: str) -> None:
        if name != self._name:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
