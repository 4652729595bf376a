"""The default policy against the other rules on traffic of very different shapes: it is worse than none of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest

from kvcache.routing.policies import POLICIES
from kvcache.simulate.routers import PolicyRouter
from kvcache.simulate.simulation import Setup, Simulation
from kvcache.simulate.synthetic import Part, chain_of
from kvcache.simulate.traces import Arrival, block_ends

COUNT = 150
OTHERS = ("consistent_hash", "bounded_load", "least_loaded")
WORSE = 1.05
"""What chance makes of so few requests; most of the others take twice as long."""


def own(draw: random.Random, number: int, mean: float) -> Part:
    return 1_000_000 + number, 200 + int(draw.expovariate(1 / mean))


SHAPES: dict[str, tuple[float, Callable[[random.Random, int], list[Part]]]] = {
    "nothing shared": (0.5, lambda draw, number: [own(draw, number, 5000)]),
    "many tenants": (0.15, lambda draw, number: [(int(draw.paretovariate(0.7)) % 2000, 3000), own(draw, number, 1000)]),
    "long and short": (
        0.2,
        lambda draw, number: [(1_000_000 + number, min(50_000, int(800 * draw.paretovariate(1.1))))],
    ),
    "a few beginnings": (0.1, lambda draw, number: [(draw.randrange(30), 6000), own(draw, number, 300)]),
}
"""Seconds between two requests on average, and what is in them."""
HOT_COUNT = 400
HOT_SHAPES: dict[str, tuple[float, Callable[[random.Random, int], list[Part]]]] = {
    "one beginning": (0.07, lambda draw, number: [(0, 12_000), own(draw, number, 1500)]),
    "another beginning every 60 requests": (
        0.04,
        lambda draw, number: [(number // 60, 10_000), own(draw, number, 200)],
    ),
}
"""Everybody has the beginning, so that all workers are to have it soon; and not all at once, while many wait."""


def traffic(shape: str, count: int = COUNT) -> list[Arrival]:
    pause_s, parts_of = (SHAPES | HOT_SHAPES)[shape]
    draw = random.Random(shape)
    times = accumulate(draw.expovariate(1 / pause_s) for _ in range(count))
    trace = []
    for number, at in enumerate(times):
        parts = parts_of(draw, number)
        num_tokens = sum(tokens for _, tokens in parts)
        trace.append(Arrival(at, num_tokens, 200, chain_of(parts), block_ends(num_tokens, 512)))
    return trace


def times_s(trace: list[Arrival], policy: str, can_pull: bool = True) -> tuple[float, float]:
    """Mean and 90th percentile of the times to first token."""
    setup = Setup(num_workers=4, can_pull=can_pull)
    result = Simulation(trace, setup, lambda: PolicyRouter(POLICIES[policy])).run()
    ttft = [outcome.ttft_s for outcome in result.outcomes if outcome.ttft_s is not None]
    assert len(ttft) == len(trace)
    return float(np.mean(ttft)), float(np.quantile(ttft, 0.9))


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_of_traffic_is_served_worse_than_by_a_simpler_rule(shape: str) -> None:
    trace = traffic(shape)
    mean_s, p90_s = times_s(trace, "prefix")
    for other in OTHERS:
        its_mean_s, its_p90_s = times_s(trace, other)
        assert mean_s <= WORSE * its_mean_s, other
        assert p90_s <= WORSE * its_p90_s, other


@pytest.mark.parametrize("can_pull", [True, False])
@pytest.mark.parametrize("shape", HOT_SHAPES)
def test_a_beginning_that_everybody_has_is_soon_where_it_is_wanted(shape: str, can_pull: bool) -> None:
    trace = traffic(shape, HOT_COUNT)
    mean_s, p90_s = times_s(trace, "prefix", can_pull)
    for other, most in (("consistent_hash", 0.75), ("bounded_load", 1.2)):
        its_mean_s, its_p90_s = times_s(trace, other, can_pull)
        assert mean_s <= most * its_mean_s, other
        assert p90_s <= most * its_p90_s, other
