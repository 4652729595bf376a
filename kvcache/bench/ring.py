"""`kvcache bench ring`: how evenly ids spread, what a lookup costs, how much moves when the ring changes.

The reference for balance is a perfect hash: ids drawn at random are uneven by themselves.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

from kvcache.bench.report import Report, report, row
from kvcache.ring import HashRing

RUNS = 15
NUM_IDS = 5000
NUM_WORKERS = 4
MANY_WORKERS = 512


def run(*, quick: bool, progress: Callable[[str], None]) -> Report:
    """Each run has workers and ids of other names."""
    lookups = 20_000 if quick else 200_000
    balance: list[float] = []
    perfect: list[float] = []
    owner_us: list[float] = []
    order_us: list[float] = []
    joined: list[float] = []
    left: list[float] = []
    join_ms: list[float] = []
    many = _ring(RUNS, MANY_WORKERS)
    for index in range(RUNS):
        progress(f"run {index + 1} of {RUNS}")
        ring = _ring(index, NUM_WORKERS)
        ids = [f"run-{index}/seq-{number}".encode() for number in range(NUM_IDS)]
        balance.append(_max_over_mean([ring.owner(key) for key in ids]))
        fair = random.Random(index)
        perfect.append(_max_over_mean([fair.choice(ring.workers) for _ in ids]))
        owner_us.append(_each_us(_ring(index, 8).owner, lookups))
        order_us.append(_order_us(_ring(index, 8), lookups // 4))
        ten, eleven = _ring(index, 10), _ring(index, 11)
        moved = sum(ten.owner(key) != eleven.owner(key) for key in ids) / NUM_IDS
        joined.append(moved)
        nine = HashRing({worker: 100 for worker in ten.workers if worker != ten.workers[0]})
        left.append(sum(ten.owner(key) != nine.owner(key) for key in ids) / NUM_IDS)
        join_ms.append(_join_ms(many, f"newcomer-{index}"))
    title = f"{NUM_IDS} ids on {NUM_WORKERS} workers, max/mean"
    rows = [
        row(f"{title}, perfect hash", perfect, ""),
        row(title, balance, "", against=perfect, reference="perfect hash", goal=1.05, sense="<=", on="value"),
        row("owner of a key, 8 workers", owner_us, "us"),
        row("all 8 workers in order", order_us, "us"),
        row("keys moved when an 11th joins 10", joined, "", goal=1.2 / 11, sense="<=", on="value"),
        row("keys moved when one of 10 leaves", left, "", goal=1.2 / 10, sense="<=", on="value"),
        row(f"one more joins a ring of {MANY_WORKERS}", join_ms, "ms"),
    ]
    over = sum(value > 1.05 for value in balance)
    by_chance = sum(value > 1.05 for value in perfect)
    notes = [f"max/mean was above 1.05 in {over} of {RUNS} runs, with the perfect hash in {by_chance}"]
    return report("ring", rows, notes)


def _ring(run_index: int, num_workers: int) -> HashRing:
    return HashRing({f"host-{run_index}-worker-{number}": 100 for number in range(num_workers)})


def _join_ms(ring: HashRing, worker: str) -> float:
    start = time.perf_counter()
    HashRing({**ring.weights, worker: 100}, before=ring)
    return (time.perf_counter() - start) * 1e3


def _max_over_mean(owners: list[str]) -> float:
    return max(Counter(owners).values()) * NUM_WORKERS / len(owners)


def _order_us(ring: HashRing, count: int) -> float:
    return _each_us(lambda key: list(ring.preference(key)), count)


def _each_us(lookup: Callable[[bytes], object], count: int) -> float:
    keys = [b"key-%d" % number for number in range(count)]
    start = time.perf_counter()
    for key in keys:
        lookup(key)
    return (time.perf_counter() - start) / count * 1e6
