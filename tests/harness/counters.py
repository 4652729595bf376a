"""What the workers have counted, for tests that hold it against what they sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from bus.stats import WorkerStats
from kvcache import AsyncClient
from tests.harness.waiting import until

Counts: TypeAlias = Mapping[str, int]
"""By the names of `EngineStats` and `StoreStats`."""

ENGINE = ("prompt_tokens", "cached_tokens", "completion_tokens", "finished", "cancelled", "failed")
STORE = ("puts", "appends", "gets", "misses", "moved_bytes", "sequences", "used_bytes", "evictions")


async def counters(client: AsyncClient) -> dict[str, Counts]:
    """Each worker's counters as they are now, which takes one to two seconds: workers report once a second."""
    first = {name: stats.uptime_s for name, stats in (await worker_stats(client)).items()}
    later: dict[str, set[float]] = {}

    async def is_fresh() -> bool:
        # The next report to arrive may have been on its way when we asked; the one after it was not.
        for name, stats in (await worker_stats(client)).items():
            later.setdefault(name, set()).add(stats.uptime_s)
        return bool(first) and all(len(times - {first.get(name)}) >= 2 for name, times in later.items())

    await until(is_fresh, "every worker reports")
    return {name: _counts(stats) for name, stats in (await worker_stats(client)).items()}


async def until_counted(
    client: AsyncClient, before: Mapping[str, Counts], expected: Mapping[str, Counts], seconds: float = 10.0
) -> None:
    """Wait until each worker has counted exactly `expected` since `before`. Raises AssertionError with what it has."""
    growth: dict[str, dict[str, int]] = {}

    async def has_counted() -> bool:
        now = {name: _counts(stats) for name, stats in (await worker_stats(client)).items()}
        for name, wanted in expected.items():
            growth[name] = {field: now[name][field] - before[name][field] for field in wanted}
        return growth == expected

    try:
        await until(has_counted, "the counters agree", seconds)
    except AssertionError:
        raise AssertionError(f"the workers counted {growth}, and should have counted {dict(expected)}") from None


async def worker_stats(client: AsyncClient) -> dict[str, WorkerStats]:
    """The last report of every worker that has reported."""
    return {view.worker_id: view.stats for view in (await client.stats()).workers if view.stats is not None}


def _counts(stats: WorkerStats) -> Counts:
    engine = {field: getattr(stats.engine, field) for field in ENGINE}
    return engine | {field: getattr(stats.store, field) for field in STORE}
