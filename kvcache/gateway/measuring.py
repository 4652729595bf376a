"""What the gateway counts for `/metrics`: answers by path and status, its loop's lag, each generation as it passes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping

from bus.errors import KVCacheError
from bus.stats import ClusterStats
from kvcache.client.generation import AsyncGeneration
from kvcache.client.results import Event
from kvcache.gateway.slowest import Progress
from kvcache.metrics.cluster import cluster_families
from kvcache.metrics.exposition import Page
from kvcache.metrics.families import OTHER, Family, Kind
from kvcache.metrics.latest import LatestStats
from kvcache.metrics.traffic import Traffic, Watch

TICK_S = 0.1
"""Between uvicorn's ticks."""


class Answers:
    """What the server sees of itself: how many answers each path gave, by status, and how late its loop is."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._paths: dict[object, str] = {}
        self._ticked_at: float | None = None
        self._lag_s = 0.0

    def know(self, paths: Mapping[object, str]) -> None:
        """paths: by the handler that serves them. What no handler serves is counted as one, whatever it was."""
        self._paths.update(paths)

    def count(self, handler: object, status: int) -> None:
        """handler: None for an answer that none gave."""
        self._counts[self._paths.get(handler, OTHER), str(status)] += 1

    def tick(self, now: float) -> None:
        """`TICK_S` have passed since the last time, and as much more as the loop is late; what was fades."""
        late_s = 0.0 if self._ticked_at is None else now - self._ticked_at - TICK_S
        self._lag_s, self._ticked_at = max(0.9 * self._lag_s, late_s), now

    def families(self) -> list[Family]:
        text = "Answers begun, by path and status; `other` is what nobody serves, or was refused before."
        samples = [(labels, float(count)) for labels, count in sorted(self._counts.items())]
        lag = Family("gateway_loop_lag_seconds", Kind.GAUGE, "How late the gateway's event loop was lately.")
        lag.add(self._lag_s)
        return [Family("http_requests", Kind.COUNTER, text, ("path", "status"), list(samples)), lag]


class Measured:
    """A generation whose events are counted as they are read. progress: of the request that it is part of."""

    def __init__(self, generation: AsyncGeneration, watch: Watch, progress: Progress) -> None:
        self._generation = generation
        self._watch = watch
        self._progress = progress

    async def next_batch(self) -> list[Event]:
        """As the generation's own."""
        try:
            batch = await self._generation.next_batch()
        except KVCacheError as error:
            self._watch.failed(error)
            self._progress.fail(error)
            raise
        now = time.monotonic()
        self._watch.saw(batch, now)
        self._progress.fold(batch, now)
        return batch

    async def cancel(self) -> None:
        self._watch.closed()
        await self._generation.cancel()


class Measures:
    """All that one gateway's `/metrics` tells."""

    def __init__(self, latest: LatestStats, answers: Answers, *, is_vllm_compatible: bool) -> None:
        self.traffic = Traffic()
        self.answers = answers
        self._latest = latest
        self._is_vllm_compatible = is_vllm_compatible

    async def page(self, accept: str) -> tuple[bytes, str]:
        """The text and its content type; whatever has become of the broker."""
        stats = (await self._latest.get()).stats
        mine = [*self.traffic.families(), *self.answers.families()]
        return await asyncio.to_thread(self._encode, stats, mine, accept)  # of a large cluster it takes a while

    def _encode(self, stats: ClusterStats | None, mine: list[Family], accept: str) -> tuple[bytes, str]:
        families = [*cluster_families(stats), *mine]
        return Page(families, is_vllm_compatible=self._is_vllm_compatible).encode(accept)
