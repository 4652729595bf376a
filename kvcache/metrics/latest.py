"""The cluster's figures as of just now, however many ask; None, and no error or long wait, when nobody answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from bus.errors import KVCacheError
from bus.stats import ClusterStats

FRESH_S = 1.0
ANSWER_S = 2.0
"""Prometheus gives a scrape 10 s, and a page that says that the broker is away is worth more than none."""


class LatestStats:
    """At most one question is under way, and an answer (or that there was none) serves for a second."""

    def __init__(self, ask: Callable[[], Awaitable[ClusterStats]], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._asking = asyncio.Lock()
        self._asked_at = float("-inf")
        self._stats: ClusterStats | None = None

    async def get(self) -> ClusterStats | None:
        async with self._asking:
            if self._clock() - self._asked_at >= FRESH_S:
                self._stats = await self._answer()
                self._asked_at = self._clock()
            return self._stats

    async def _answer(self) -> ClusterStats | None:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._ask()
        except (KVCacheError, TimeoutError):
            return None
