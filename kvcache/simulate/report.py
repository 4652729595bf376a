"""From results to figures: what a policy reached, as numbers, over several seeds, as a table."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from kvcache.simulate.costs import Costs
from kvcache.simulate.simulation import Result
from kvcache.simulate.traces import Arrival

AFTER_S = 600.0
"""`hit_after` is over the arrivals in this many seconds after the first change."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One run, or the mean of several. Shares of prompt tokens: hit (pulled ones included), pulled. TTFT in seconds.

    of_optimum: hit against one infinite cache that everybody shares. imbalance: busy seconds of the busiest worker
    over their mean. slo: share of requests whose first token came in time. hit_after: see `AFTER_S`.
    """

    hit: float
    of_optimum: float
    pulled: float
    imbalance: float
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    slo: float
    evicted_tokens: float
    unserved: float
    hit_after: float | None = None


class PolicyReport(msgspec.Struct, frozen=True, kw_only=True):
    """runs: one for each seed. reasons: how often each decided, over all runs."""

    policy: str
    mean: Figures
    runs: list[Figures]
    reasons: dict[str, int]


def optimum(trace: Sequence[Arrival]) -> float:
    """The share of prompt tokens that one infinite cache, of everybody, would have."""
    return sum(_seen_tokens(trace)) / sum(arrival.num_tokens for arrival in trace)


def shared_queue_s(trace: Sequence[Arrival], costs: Costs, num_workers: int) -> list[float]:
    """Times to first token if all workers served one queue, first come first served, out of one infinite cache.

    What no router can be: each worker takes whatever is next, and finds all that anybody ever computed.
    """
    free_at = [0.0] * num_workers
    ttft = []
    for arrival, seen in zip(trace, _seen_tokens(trace), strict=True):
        hit = min(seen, arrival.num_tokens - 1)
        done = max(free_at[0], arrival.at) + costs.rates.prefill_s(arrival.num_tokens, hit)
        heapq.heapreplace(free_at, done)
        ttft.append(done - arrival.at)
    return ttft


def figures(result: Result, best_hit: float, slo_s: float) -> Figures:
    """`best_hit`: the trace's `optimum`."""
    outcomes = result.outcomes
    served = [outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]
    ttft = np.array(served if served else [np.inf])
    tokens = sum(outcome.arrival.num_tokens for outcome in outcomes)
    hit = sum(outcome.hit_tokens for outcome in outcomes) / tokens
    busy = list(result.busy_s.values())
    p50, p90, p99 = (float(value) for value in np.percentile(ttft, (50, 90, 99)))
    changes = [change.at for change in result.setup.changes]
    return Figures(
        hit=hit,
        of_optimum=hit / best_hit if best_hit else 1.0,
        pulled=sum(outcome.pulled_tokens for outcome in outcomes) / tokens,
        imbalance=max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0,
        mean_s=float(ttft.mean()),
        p50_s=p50,
        p90_s=p90,
        p99_s=p99,
        slo=sum(seconds <= slo_s for seconds in served) / len(outcomes),
        evicted_tokens=result.evicted_tokens,
        unserved=len(outcomes) - len(served),
        hit_after=_hit_between(result, min(changes), min(changes) + AFTER_S) if changes else None,
    )


def mean(runs: Sequence[Figures]) -> Figures:
    """Figure by figure."""
    values = {}
    for name in Figures.__struct_fields__:
        known = [getattr(run, name) for run in runs if getattr(run, name) is not None]
        values[name] = sum(known) / len(known) if known else None
    return msgspec.convert(values, Figures)


def show(reports: Sequence[PolicyReport], title: str, bound: Sequence[float], console: Console) -> None:
    """Print the table for people. bound: see `shared_queue_s`."""
    console.print(title, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    has_after = any(report.mean.hit_after is not None for report in reports)
    names = ["policy", "hit", "of opt.", "pulled", "max/mean", "mean s", "p50 s", "p90 s", "p99 s", "in time"]
    for name in [*names, *(["hit after"] if has_after else [])]:
        table.add_column(name, justify="left" if name == "policy" else "right")
    for report in reports:
        all_ = report.mean
        row = [
            report.policy,
            f"{all_.hit:.3f}",
            f"{all_.of_optimum:.0%}",
            f"{all_.pulled:.3f}",
            f"{all_.imbalance:.2f}",
        ]
        row += [f"{value:.2f}" for value in (all_.mean_s, all_.p50_s, all_.p90_s, all_.p99_s)]
        row.append(f"{all_.slo:.1%}")
        if all_.hit_after is not None:
            row.append(f"{all_.hit_after:.3f}")
        table.add_row(*row)
    console.print(table)
    p50, p90, p99 = np.percentile(bound, (50, 90, 99))
    figures_ = f"mean {np.mean(bound):.2f} s, p50 {p50:.2f}, p90 {p90:.2f}, p99 {p99:.2f}"
    console.print(
        f"one queue and one infinite cache for all workers, which no router can be: {figures_}", soft_wrap=True
    )


def _seen_tokens(trace: Sequence[Arrival]) -> Iterator[int]:
    """Of each prompt, how many of its leading tokens one cache of all before it would have."""
    seen: set[bytes] = set()
    for arrival in trace:
        depth = next((i for i, node in enumerate(arrival.chain) if node not in seen), len(arrival.chain))
        yield arrival.ends[depth - 1] if depth else 0
        seen.update(arrival.chain)


def _hit_between(result: Result, start: float, end: float) -> float | None:
    chosen = [outcome for outcome in result.outcomes if start <= outcome.arrival.at < end]
    tokens = sum(outcome.arrival.num_tokens for outcome in chosen)
    return sum(outcome.hit_tokens for outcome in chosen) / tokens if tokens else None
