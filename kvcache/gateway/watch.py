"""What the dashboard is fed with: one view of the cluster, at most one a second, whoever looks.

No task runs when nobody does. The viewer that finds the latest frame too old makes a new one while the others wait for
it, of an answer of the broker that `/metrics` may have asked for; one that leaves in the middle hands that on to the
next. A viewer that reads slowly misses frames, and nobody waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from importlib.metadata import version

import msgspec

from bus.errors import Overloaded
from kvcache.gateway.slowest import Slow, Slowest
from kvcache.metrics.latest import LatestStats
from kvcache.trends import Point, Snapshot, Trends

POLL_S = 1.0
MAX_VIEWERS = 64

_encode = msgspec.json.Encoder().encode


class History(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="history"):
    """The first event: what gateway this is, and the points so far."""

    version: str
    poll_s: float
    points: Sequence[Point]


class Now(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="now"):
    """The cluster as it is."""

    snapshot: Snapshot


class SlowestNow(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="slowest"):
    """The slowest requests, whenever they are others than before."""

    requests: Sequence[Slow]


class Watch:
    """Owns the trends. latest: shared with all others who ask. slowest: told by those who answer requests."""

    def __init__(self, latest: LatestStats, slowest: Slowest) -> None:
        self._latest = latest
        self._slowest = slowest
        self._trends = Trends()
        self._making = asyncio.Lock()
        self._shown_at = float("-inf")
        self._frame = b""
        self._num_frames = 0
        self._num_viewers = 0

    def enter(self) -> None:
        """One more viewer. Raises Overloaded."""
        if self._num_viewers >= MAX_VIEWERS:
            raise Overloaded(f"{MAX_VIEWERS} dashboards are open, which is the most", retry_after_ms=5000)
        self._num_viewers += 1

    def leave(self) -> None:
        self._num_viewers -= 1

    def history(self) -> bytes:
        """The first event of a viewer."""
        return _encode(History(version=version("kvcache"), poll_s=POLL_S, points=self._trends.history))

    async def next_frame(self, after: int) -> tuple[int, bytes]:
        """A frame later than number `after`, and its own number."""
        async with self._making:
            if self._num_frames <= after:
                await asyncio.sleep(self._shown_at + POLL_S - time.monotonic())
                self._frame = _encode(Now(snapshot=await self._next_snapshot()))
                self._num_frames += 1
            return self._num_frames, self._frame

    def slowest(self, after: int) -> tuple[int, bytes] | None:
        """The slowest requests and their version; None if that is `after` still."""
        requests = self._slowest.shown(time.time())
        if self._slowest.version == after:
            return None
        return self._slowest.version, _encode(SlowestNow(requests=requests))

    async def _next_snapshot(self) -> Snapshot:
        report = await self._latest.get(newer_than=self._shown_at)
        self._shown_at = report.at
        at = round(time.time() - (time.monotonic() - report.at), 2)
        if report.stats is None:
            return self._trends.miss(report.problem, report.at, at)
        return self._trends.fold(report.stats, report.at, at)
