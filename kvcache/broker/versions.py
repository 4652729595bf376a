"""Versions of sequences: which of two writes came later, whoever made them.

A hybrid logical clock (Kulkarni, Demirbas, Madappa, Avva, Leone 2014, "Logical physical clocks", section 3):
milliseconds of the wall clock above, a counter below. What others have made is taken into account, so a broker
whose clock is behind still numbers its writes after those that it has heard of. The wall clock is read once, at
the start: later jumps of it change nothing.
"""

from __future__ import annotations

from bus.errors import MalformedMessage

COUNTER_BITS = 20
MAX_AHEAD_MS = 366 * 24 * 3600 * 1000


class Versions:
    """`wall_ms`: milliseconds since 1970, at `now` (monotonic seconds)."""

    def __init__(self, wall_ms: int, now: float) -> None:
        self._wall_ms = wall_ms
        self._started_at = now
        self._last = 0

    def next(self, now: float) -> int:
        """A version greater than any made or seen here, at least 1."""
        self._last = max(self._last + 1, self._now_ms(now) << COUNTER_BITS)
        return self._last

    def saw(self, version: int, now: float) -> None:
        """Somebody else made this one. Raises MalformedMessage if it is a year ahead, which no clock is."""
        if version >> COUNTER_BITS > self._now_ms(now) + MAX_AHEAD_MS:
            raise MalformedMessage(f"version {version} is more than a year ahead of this broker's clock")
        self._last = max(self._last, version)

    def _now_ms(self, now: float) -> int:
        return self._wall_ms + max(0, int((now - self._started_at) * 1000))
