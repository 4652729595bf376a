"""On how many workers a beginning of prompts is due: as many as its share of the traffic keeps busy.

A beginning that a share f of all requests have will be computed (or pulled) on f * N of N workers sooner or later,
unless all who have it are to wait for fewer. So a copy that is still due is an investment, paid once whoever makes it,
and no burden on those who come next: they have it too. `kvcache.routing.prefix` charges it accordingly.

A share is of the requests after the first that had the beginning, so that a new one is known for what it is after a few
requests and not after a minute; one more for each worker is taken to have had something else (a prior: what was seen
twice says little). Old ones count less and less (forward decay: Cormode, Shkapenyuk, Srivastava, Xu 2009, section 3).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kvcache.routing.keys import HALF_LIFE_S, MAX_WORTH
from kvcache.routing.views import Belief

MAX_BEGINNINGS = 32_768
"""That are remembered, the last ones asked for: those of a thousand of the longest prompts."""
ROUNDED = 0.5
"""A copy is due from half of an average worker's worth of traffic on."""
LEAST_S = 1e-9
"""Seconds a token: no worker is quicker, whatever it reports."""

Beginning: TypeAlias = tuple[Hashable, int]
"""What names all tokens up to a place in a prompt, and how many these are."""


@dataclass(slots=True)
class _Seen:
    """again: requests that had it after the first; before: requests up to that one. Both as decayed sums."""

    again: float
    before: float


class Shares:
    """What part of recent requests had which beginning."""

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, _Seen] = OrderedDict()
        self._total = 0.0
        self._epoch: float | None = None

    def __len__(self) -> int:
        return len(self._seen)

    def arrived(self, beginnings: Iterable[Beginning], now: float) -> None:
        """A request came whose prompt has these beginnings."""
        worth = self._worth(now)
        if worth > MAX_WORTH:
            worth = self._rescale(worth, now)
        self._total += worth
        seen = self._seen
        for name, _ in beginnings:
            known = seen.get(name)
            if known is None:
                seen[name] = _Seen(0.0, self._total)
            else:
                known.again += worth
                seen.move_to_end(name)
        while len(seen) > MAX_BEGINNINGS:
            seen.popitem(last=False)

    def due_tokens(
        self, beginnings: Sequence[Beginning], hits: Mapping[str, int], beliefs: Mapping[str, Belief], now: float
    ) -> int:
        """The tokens of the longest of a prompt's beginnings, shortest first, that is due on more workers than have it.

        hits: how many leading tokens of the prompt each worker has or is computing. 0 if no copy is due. The request
        itself counts as one that came.
        """
        worth, num_workers = self._worth(now), len(beliefs)
        have: list[tuple[int, float]] | None = None
        due_tokens = 0
        for name, num_tokens in beginnings:
            known = self._seen.get(name)
            if known is None:
                break
            others = self._total - known.before + num_workers * worth
            due = num_workers * (known.again + worth) / (others + worth)
            if due < ROUNDED:
                continue  # a longer one may be newer, and hot since
            if have is None:
                have = _sized(hits, beliefs)
            if due >= ROUNDED + sum(size for tokens, size in have if tokens >= num_tokens):
                due_tokens = num_tokens
        return due_tokens

    def _worth(self, now: float) -> float:
        """What a request counts now: twice as much with every half-life."""
        if self._epoch is None:
            self._epoch = now
        return float(2.0 ** min((now - self._epoch) / HALF_LIFE_S, 1000.0))

    def _rescale(self, worth: float, now: float) -> float:
        """Make a request count 1 again, before the numbers outgrow a float."""
        for known in self._seen.values():
            known.again /= worth
            known.before /= worth
        self._total /= worth
        self._epoch = now
        return 1.0


def _sized(hits: Mapping[str, int], beliefs: Mapping[str, Belief]) -> list[tuple[int, float]]:
    """What each worker has, and for how many average ones it counts: one twice as quick serves twice as many."""
    speeds = {worker: 1 / max(belief.rates.token_s, LEAST_S) for worker, belief in beliefs.items()}
    average = sum(speeds.values()) / len(speeds)
    return [(tokens, speeds[worker] / average) for worker, tokens in hits.items() if worker in speeds]
