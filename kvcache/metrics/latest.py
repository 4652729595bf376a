"""The cluster's figures as of just now, however many ask; and no error or long wait when nobody answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bus.errors import KVCacheError
from bus.stats import ClusterStats

FRESH_S = 1.0
ANSWER_S = 2.0
"""Prometheus gives a scrape 10 s, and a page that says that the broker is away is worth more than none."""


@dataclass(frozen=True, slots=True)
class Report:
    """An answer of the broker, or that there was none: then `stats` is None, and `problem` says why.

    at: when it came, monotonic seconds.
    """

    stats: ClusterStats | None
    problem: str
    at: float


class LatestStats:
    """At most one question is under way, and an answer (or that there was none) serves for a second."""

    def __init__(self, ask: Callable[[], Awaitable[ClusterStats]], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._asking = asyncio.Lock()
        self._report = Report(None, "", float("-inf"))

    async def get(self, newer_than: float = float("-inf")) -> Report:
        """The latest, if it came later than `newer_than` and is fresh; else the broker is asked.

        One whose caller is cancelled while it asks leaves the question to the next.
        """
        async with self._asking:
            if self._clock() - self._report.at >= FRESH_S or self._report.at <= newer_than:
                stats, problem = await self._answer()
                self._report = Report(stats, problem, self._clock())
            return self._report

    async def _answer(self) -> tuple[ClusterStats | None, str]:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._ask(), ""
        except TimeoutError:
            return None, f"the broker has not answered for {ANSWER_S:.0f} s"
        except KVCacheError as error:
            return None, str(error)
