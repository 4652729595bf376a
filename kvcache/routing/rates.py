"""How quick each worker is, learned from the seconds that its prefills really took.

A prefill of n tokens after c cached ones is modelled as START_TOKENS * token_s + (n - c) * (token_s + context_s * mean
context + decode_s * decodes): reading the weights, linear layers, attention, and the sequences that decode in the same
steps. The three are fitted by least squares over recent prefills, each weighted by its tokens, old ones fading (least
squares with exponential forgetting: Ljung 1999, "System Identification", section 11.2), and kept from falling below
zero.

What was learned of a worker that now has nothing to do loses weight: a worker that was slow once, or frozen, is sent
nothing for that, and so would never show that it is no longer. It is hoped to be like the quickest (optimism under
uncertainty: Lai, Robbins 1985, "Asymptotically efficient adaptive allocation rules"), the more the longer it has idled.
"""

from __future__ import annotations

from math import inf
from statistics import median

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from kvcache.routing.views import UNKNOWN_RATES, Rates

MEMORY = 64
"""Prefills after which one counts 1/e: enough to average noise, few enough to follow a worker that slows down."""
FADE = 1.0 - 1.0 / MEMORY
HOPE_HALF_LIFE_S = 15.0
"""Idle time in which half of what a worker is slower than the quickest is forgiven. As workers within 15 % are equals,
one that is twice as slow is tried once in 40 s of idling, one that was stopped and seems 100 times as slow in 140 s."""
START_TOKENS = 64
"""Tokens whose computing takes as long as reading the weights once, which a prompt of one token does too: without them
it would teach that each token costs a whole step. A machine's operations a second over its bytes a second, in weights
of two bytes: 20 to 40 on processors with matrix units, 150 on an A100, 300 on an H100. It is not fitted because prompts
that are all about as short, as those of warm chats are, leave open what is their beginning and what their length."""
INERTIA = 1e-3
"""The share by which the last fit holds on: it only decides what the figures leave open, such as lengths all equal."""


class RateLearner:
    """One worker's rates. Figures that cannot be (no tokens, no time) are passed over."""

    def __init__(self, prior: Rates, start_tokens: int = START_TOKENS) -> None:
        self.rates = prior
        self._start_tokens = start_tokens
        self._squares: NDArray[np.float64] = np.zeros((3, 3))
        self._products: NDArray[np.float64] = np.zeros(3)

    def prefilled(self, num_tokens: int, num_cached: int, decodes: int, seconds: float) -> None:
        """A prompt of `num_tokens`, of which `num_cached` were not computed, took `seconds` of the worker's time."""
        computed = num_tokens - num_cached
        if computed <= 0 or not 0.0 < seconds < inf:
            return
        size = computed + self._start_tokens
        share = computed / size
        features = np.array([1.0, share * (num_tokens + num_cached) / 2, share * decodes])
        self.fade(FADE)
        self._squares = self._squares + size * np.outer(features, features)
        self._products = self._products + seconds * features
        token_s, context_s, decode_s = self._fit(seconds / size)
        self.rates = replace(
            self.rates,
            token_s=token_s,
            context_s=context_s,
            decode_s=decode_s,
            is_learned=True,
            start_tokens=self._start_tokens,
        )

    def fade(self, share: float) -> None:
        """Let what was reported so far count only so much from now on."""
        self._squares = share * self._squares
        self._products = share * self._products

    def _fit(self, measured: float) -> tuple[float, float, float]:
        known = self.rates
        held = np.array([known.token_s, known.context_s, known.decode_s] if known.is_learned else [measured, 0.0, 0.0])
        inertia = INERTIA * np.diag(self._squares)
        matrix = self._squares + np.diag(inertia)
        target = self._products + inertia * held
        fitted = np.zeros(3)
        free = [index for index in range(3) if matrix[index, index] > 0.0]
        while free:
            fitted[:] = 0.0
            fitted[free] = np.linalg.solve(matrix[np.ix_(free, free)], target[free])
            lowest = min(free, key=lambda index: float(fitted[index]))
            if fitted[lowest] >= 0.0:
                break
            free.remove(lowest)  # what the figures say is below zero is zero, and the others explain the rest
        return float(fitted[0]), float(fitted[1]), float(fitted[2])


class RateBook:
    """The rates of all workers; one that has reported nothing is taken to be like the others, or else like `prior`."""

    def __init__(self, prior: Rates = UNKNOWN_RATES) -> None:
        self._prior = prior
        self._learners: dict[str, RateLearner] = {}
        # Tokens computed, those that beginning counts for included, and sums over them; old ones fade.
        self._tokens = self._context = self._decodes = 0.0
        self._least: float | None = None
        self._median: Rates | None = None

    def prefilled(self, worker: str, num_tokens: int, num_cached: int, decodes: int, seconds: float) -> None:
        """As `RateLearner.prefilled`, of this worker."""
        if worker not in self._learners:
            self._learners[worker] = RateLearner(self._typical())
        self._learners[worker].prefilled(num_tokens, num_cached, decodes, seconds)
        computed = max(0, num_tokens - num_cached)
        self._tokens = FADE * self._tokens + (computed + START_TOKENS if computed else 0)
        self._context = FADE * self._context + computed * (num_tokens + num_cached) / 2
        self._decodes = FADE * self._decodes + computed * decodes
        self._least = self._median = None

    def rates(self, worker: str, idle_s: float = 0.0) -> Rates:
        """As learned; of a worker that has had nothing to compute for `idle_s`, as hoped."""
        learner = self._learners.get(worker)
        if learner is None or not learner.rates.is_learned:
            return self._typical()
        return learner.rates if idle_s <= 0.0 else self._hoped(learner.rates, idle_s)

    def tried(self, worker: str, idle_s: float) -> None:
        """A worker that had nothing to compute for `idle_s` is given something: what its slowness rests on is old."""
        learner = self._learners.get(worker)
        if learner is not None and learner.rates.is_learned and self._cost(learner.rates) > self._least_cost():
            learner.fade(_remaining(idle_s))

    @property
    def is_learned(self) -> bool:
        """Whether any rates are measured, and so all of them at least likely."""
        return any(learner.rates.is_learned for learner in self._learners.values())

    def forget(self, worker: str) -> None:
        self._learners.pop(worker, None)
        self._least = self._median = None

    def _hoped(self, rates: Rates, idle_s: float) -> Rates:
        """All three nearer to the quickest worker's by one factor, so that lengths keep their proportions."""
        cost, least = self._cost(rates), self._least_cost()
        if cost <= least:
            return rates
        share = (least + (cost - least) * _remaining(idle_s)) / cost
        return replace(
            rates, token_s=share * rates.token_s, context_s=share * rates.context_s, decode_s=share * rates.decode_s
        )

    def _least_cost(self) -> float:
        if self._least is None:
            self._least = min(self._cost(one.rates) for one in self._learners.values() if one.rates.is_learned)
        return self._least

    def _cost(self, rates: Rates) -> float:
        """Seconds for a token of recent traffic, times how many tokens that was."""
        return rates.token_s * self._tokens + rates.context_s * self._context + rates.decode_s * self._decodes

    def _typical(self) -> Rates:
        """Kept until a rate changes: a cluster of a thousand asks for it as often at each tick while it is young."""
        if self._median is None:
            self._median = self._middle()
        return self._median

    def _middle(self) -> Rates:
        known = [learner.rates for learner in self._learners.values() if learner.rates.is_learned]
        if not known:
            return self._prior
        return Rates(
            token_s=median(rates.token_s for rates in known),
            context_s=median(rates.context_s for rates in known),
            decode_s=median(rates.decode_s for rates in known),
            start_tokens=START_TOKENS,
        )


def _remaining(idle_s: float) -> float:
    """The share that is left of what is to be forgiven, or forgotten."""
    return float(0.5 ** (idle_s / HOPE_HALF_LIFE_S))
