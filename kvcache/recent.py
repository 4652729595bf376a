"""Totals that processes report, and what was added to them lately. Core: no IO, no clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

HIT_RATE_S = 30.0
"""Prompts come now and then, so this is the longest window that anything is asked for."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts that only grow."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    requests: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
            self.tokens + other.tokens,
            self.requests + other.requests,
        )

    def since(self, other: Totals) -> Totals:
        """What was added; never negative, whatever a peer tells."""
        return Totals(
            max(0, self.prompt_tokens - other.prompt_tokens),
            max(0, self.cached_tokens - other.cached_tokens),
            max(0, self.tokens - other.tokens),
            max(0, self.requests - other.requests),
        )

    def hit_rate(self) -> float | None:
        """Of the prompt tokens, the part (0 to 1) that was cached; None if there were none."""
        return round(min(1.0, self.cached_tokens / self.prompt_tokens), 4) if self.prompt_tokens else None


class Counter:
    """One process's totals as they grow, and what was added lately. incarnation: another one begins at zero."""

    def __init__(self) -> None:
        self._incarnation: int | None = None
        self._last = Totals()
        self._grown = Totals()
        self._samples: deque[tuple[float, Totals]] = deque()

    def add(self, incarnation: int, totals: Totals, now: float) -> Totals:
        """What is new; of the first report nothing, since it is not known since when."""
        first = self._incarnation is None
        before = self._last if incarnation == self._incarnation else Totals()
        new = Totals() if first else totals.since(before)
        self._incarnation, self._last = incarnation, totals
        self.grow(new, now)
        return new

    def grow(self, new: Totals, now: float) -> None:
        self._grown += new
        self._samples.append((now, self._grown))
        while len(self._samples) > 2 and self._samples[1][0] <= now - HIT_RATE_S:
            self._samples.popleft()

    def within(self, seconds: float) -> tuple[Totals, float]:
        """What was added in the last `seconds`, and in how many seconds that was; 0 if there is one sample."""
        if not self._samples:
            return Totals(), 0.0
        now, last = self._samples[-1]
        start, first = next(sample for sample in self._samples if sample[0] >= now - seconds - 0.5)
        return last.since(first), now - start

    def hit_rate(self) -> float | None:
        """Of the prompt tokens of late, the part that was cached; None if there were none."""
        return self.within(HIT_RATE_S)[0].hit_rate()
