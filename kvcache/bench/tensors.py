"""`kvcache bench tensors`: put and get of K and V through the broker, against other ways to move a tensor.

Ours crosses two hops (client, broker, worker), is checked at both ends (crc32c) and is copied into the
worker's pool; the references go straight from process to process, but for the raw frames that `zmq.proxy`
forwards, which show what the second hop costs by itself. All over TCP loopback, one request at a time, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from crc32c import crc32c

from kvcache.bench.peers.contract import Store, measure_store
from kvcache.bench.report import Report, Row, report, row
from kvcache.bench.stores import forwarded_store, http_store, raw_store, safetensors_store
from kvcache.bench.systems.stores import OurStore
from kvcache.client import Client
from kvcache.local import cluster

RUNS = 5
KIB, MIB = 1 << 10, 1 << 20
SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
GOAL_SIZES = (MIB, 4 * MIB, 16 * MIB)
GOAL = 0.5
VERBS = ("put", "get")
OTHERS = ("raw through zmq.proxy", "safetensors", "base64 JSON over HTTP")


def run(*, quick: bool, progress: Callable[[str], None]) -> Report:
    """For each size five runs, in each of which every store puts and gets as much."""
    repeats = 3 if quick else 10
    rows: list[Row] = []
    with _stores(progress) as stores:
        for size in SIZES:
            figures: dict[tuple[str, str], list[float]] = {}
            for index in range(RUNS):
                progress(f"{_text(size)}, run {index + 1} of {RUNS}")
                for name, store in stores.items():
                    few = 1 if name.startswith("base64") else repeats
                    seconds = measure_store(store, size, few, appends=False)
                    for verb in VERBS:
                        figures.setdefault((name, verb), []).append(size / seconds[verb] / 1e9)
            rows += _rows(size, figures)
    return report("tensors", rows, _where_the_rest_goes())


def _rows(size: int, figures: dict[tuple[str, str], list[float]]) -> Iterator[Row]:
    for verb in VERBS:
        name, ours = f"{verb} {_text(size)}", figures["ours", verb]
        goal = GOAL if size in GOAL_SIZES else None
        yield row(f"{name}, raw frames", figures["raw", verb], "GB/s")
        yield row(name, ours, "GB/s", against=figures["raw", verb], reference="raw frames", goal=goal)
        for other in OTHERS:
            yield row(name, ours, "GB/s", against=figures[other, verb], reference=other)


@contextmanager
def _stores(progress: Callable[[str], None]) -> Iterator[dict[str, Store]]:
    progress("starting a broker, a worker and the reference servers")
    with ExitStack() as stack:
        # A put replaces what was there when it commits, so for a while both need room.
        url = stack.enter_context(
            cluster(1, "--kv-cache-memory-bytes", "512MiB", "--kv-plane-bytes", "256MiB", model=None)
        )
        yield {
            "raw": stack.enter_context(raw_store()),
            "ours": OurStore(stack.enter_context(Client(url, timeout=60.0))),
            OTHERS[0]: stack.enter_context(forwarded_store()),
            OTHERS[1]: stack.enter_context(safetensors_store()),
            OTHERS[2]: stack.enter_context(http_store()),
        }


def _where_the_rest_goes() -> list[str]:
    """What the parts of our path cost by themselves, here and now."""
    block = np.random.default_rng(0).integers(0, 255, 16 * MIB, np.uint8)
    target = np.empty_like(block)
    crc = 16 * MIB / _best_s(lambda: crc32c(block.data)) / 1e9
    copy = 16 * MIB / _best_s(lambda: np.copyto(target, block)) / 1e9
    return [
        f"crc32c runs at {crc:.1f} GB/s (once at each end), a copy in memory at {copy:.1f} GB/s (once, into the pool or"
        " into the result); the rest is the second hop: each byte crosses the kernel's loopback twice, and two cores"
        " carry six busy threads"
    ]


def _best_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _text(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
