"""What metrics are made of before anybody writes them down: families of samples, and histograms. Core.

Names are written here without their prefix and, of counters, without `_total`. Every label's values come from a bounded
set: workers, models, reasons and codes, never from what a request says.
"""

from __future__ import annotations

import enum
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

OTHER = "other"


class Kind(enum.Enum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram at one moment. counts: of values up to each bound, cumulative; the last bound is infinite."""

    counts: tuple[int, ...]
    bounds: tuple[float, ...]
    total: float


Labels = tuple[str, ...]
Value = float | Buckets


@dataclass(frozen=True, slots=True)
class Family:
    """All samples of one name. samples: by the values of `labels`, in their order."""

    name: str
    kind: Kind
    text: str
    labels: Labels = ()
    samples: list[tuple[Labels, Value]] = field(default_factory=list)

    def add(self, value: Value, *labels: str) -> None:
        self.samples.append((labels, value))


class Histogram:
    """Counts values by the first bound that they do not exceed."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = (*bounds, float("inf"))
        self._counts = [0] * len(self._bounds)
        self._total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._total += value * times

    def buckets(self) -> Buckets:
        return Buckets(tuple(accumulate(self._counts)), self._bounds, self._total)


def capped(counts: Mapping[str, int], most: int) -> dict[str, int]:
    """The `most` greatest of them, and all others together as `other`, in the order of their names."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[most:])
    shown = dict(sorted(ranked[:most]))
    return shown | ({OTHER: shown.get(OTHER, 0) + rest} if len(ranked) > most else {})


def by_label(family: Family, values: Iterable[tuple[str, float]]) -> Family:
    """The family with a sample for each value of its only label."""
    for label, value in values:
        family.add(value, label)
    return family
