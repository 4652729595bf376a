"""Places where a test may have this process fail, so that "just before the answer" is hit exactly and not by luck.

Off unless `KVCACHE_FAILPOINT` is set at start. The shell passes these points:

    worker.reply    before an answer within a call is sent
    worker.publish  before tokens are published
    worker.nodes    before a broker is told what this worker holds
    worker.load     at each stage of loading a model
    peer.chunk      before a chunk of KV is sent to another worker
"""

from __future__ import annotations

import os
import signal


class Failpoint:
    """`NAME:ACTION@N`: when point NAME is reached the Nth time, `kill9` or `stop` ourselves, `corrupt` or `drop` what
    is about to be sent.

    The form was checked by the config.
    """

    def __init__(self, text: str) -> None:
        self._name, _, action = text.partition(":")
        self._action, _, count = action.partition("@")
        self._left = int(count)

    def reach(self, name: str) -> bool:
        """Whether what is to be sent now is to be corrupted or dropped."""
        if name != self._name:
            return False
        self._left -= 1
        if self._left != 0:
            return False
        if self._action in {"corrupt", "drop"}:
            return True
        os.kill(os.getpid(), signal.SIGKILL if self._action == "kill9" else signal.SIGSTOP)
        return False
