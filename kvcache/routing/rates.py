"""How quick each worker is, learned from the seconds that its prefills really took.

A prefill of n tokens after c cached ones is modelled as (n - c) * (token_s + context_s * mean context + decode_s *
decodes): linear layers, attention, and the sequences that decode in the same steps. The three are fitted by least
squares over recent prefills, each weighted by its tokens, old ones fading (least squares with exponential
forgetting: Ljung 1999, "System Identification", section 11.2), and kept from falling below zero.
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
INERTIA = 1e-3
"""The share by which the last fit holds on: it only decides what the figures leave open, such as lengths all equal."""


class RateLearner:
    """One worker's rates. Figures that cannot be (no tokens, no time) are passed over."""

    def __init__(self, prior: Rates) -> None:
        self.rates = prior
        self._squares: NDArray[np.float64] = np.zeros((3, 3))
        self._products: NDArray[np.float64] = np.zeros(3)

    def prefilled(self, num_tokens: int, num_cached: int, decodes: int, seconds: float) -> None:
        """A prompt of `num_tokens`, of which `num_cached` were not computed, took `seconds` of the worker's time."""
        computed = num_tokens - num_cached
        if computed <= 0 or not 0.0 < seconds < inf:
            return
        features = np.array([1.0, (num_tokens + num_cached) / 2, float(decodes)])
        fade = 1.0 - 1.0 / MEMORY
        self._squares = fade * self._squares + computed * np.outer(features, features)
        self._products = fade * self._products + seconds * features
        token_s, context_s, decode_s = self._fit(seconds / computed)
        self.rates = replace(self.rates, token_s=token_s, context_s=context_s, decode_s=decode_s, is_learned=True)

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

    def learner(self, worker: str) -> RateLearner:
        """Where `worker`'s figures go."""
        return self._learners.setdefault(worker, RateLearner(self._typical()))

    def rates(self, worker: str) -> Rates:
        learner = self._learners.get(worker)
        return learner.rates if learner is not None and learner.rates.is_learned else self._typical()

    @property
    def is_learned(self) -> bool:
        """Whether any rates are measured, and so all of them at least likely."""
        return any(learner.rates.is_learned for learner in self._learners.values())

    def forget(self, worker: str) -> None:
        self._learners.pop(worker, None)

    def _typical(self) -> Rates:
        known = [learner.rates for learner in self._learners.values() if learner.rates.is_learned]
        if not known:
            return self._prior
        return Rates(
            token_s=median(rates.token_s for rates in known),
            context_s=median(rates.context_s for rates in known),
            decode_s=median(rates.decode_s for rates in known),
        )
