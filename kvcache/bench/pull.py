"""`kvcache bench pull`: time to the first token when KV comes from another worker, against computing it again.

The whole path with the real model: one worker has computed a prompt, the other is sent it and told to copy. In turn
with each pull the second worker computes another prompt of that length from nothing, which is the reference.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from bus.stats import PeerStats
from kvcache.bench.report import Report, Row, report, row
from kvcache.client import Client
from kvcache.local import cluster, name_on

LENGTHS = (256, 1024, 2048, 4096)
RUNS = 5
UNIT_TOKENS = 1024
VOCABULARY = range(1000, 40_000)
STATUS_S = 2.5


def run(*, quick: bool, progress: Callable[[str], None]) -> Report:
    """Five pulls and recomputations of each length in turn; `quick`: two lengths."""
    rows: list[Row] = []
    progress("starting a broker and two workers, loading SmolLM2")
    with cluster(2) as url, Client(url, timeout=300.0) as client:
        source, target = sorted(view.worker_id for view in client.workers())
        draw = random.Random(23)
        for worker in (source, target):
            _first_token(client, draw.choices(VOCABULARY, k=64), worker)
        for length in LENGTHS[1:2] if quick else LENGTHS:
            pulled, computed = [], []
            for index in range(RUNS):
                progress(f"{length} tokens, run {index + 1} of {RUNS}")
                prompt = draw.choices(VOCABULARY, k=length)
                _first_token(client, prompt, source)
                computed.append(_first_token(client, draw.choices(VOCABULARY, k=length), target)[0])
                seconds, hit = _first_token(client, prompt, target, pull_from=source)
                if hit < length - 64:
                    time.sleep(STATUS_S)
                    failures = _peers(client, target).failures
                    raise RuntimeError(f"only {hit} of {length} tokens came from the other worker: {failures}")
                pulled.append(seconds)
            rows += _rows(length, pulled, computed)
        time.sleep(STATUS_S)  # figures come each second
        peers = _peers(client, target)
    rate = peers.pulled_bytes / peers.pulled_s / 1e6
    rows.append(row("pulled, on average", [rate], "MB/s"))
    rows.append(row("rate that the worker reports", [peers.bytes_per_s / 1e6], "MB/s"))
    return report("pull", rows, [f"SmolLM2-135M-Instruct, {peers.pulled_bytes // peers.pulled_tokens:,} bytes a token"])


def _rows(length: int, pulled: list[float], computed: list[float]) -> list[Row]:
    """In milliseconds for the prompt, and for each 1,024 tokens of it."""
    name, share = f"first token, {length} tokens", 1000 * UNIT_TOKENS / length
    found = [
        row(f"{name}, computed", [1000 * s for s in computed], "ms"),
        row(
            f"{name}, pulled",
            [1000 * s for s in pulled],
            "ms",
            against=[1000 * s for s in computed],
            reference="computed",
            goal=0.5,
            sense="<=",
        ),
    ]
    if length != UNIT_TOKENS:
        found.append(row(f"for each {UNIT_TOKENS:,} tokens, computed", [share * s for s in computed], "ms"))
        found.append(row(f"for each {UNIT_TOKENS:,} tokens, pulled", [share * s for s in pulled], "ms"))
    return found


def _first_token(
    client: Client, token_ids: list[int], worker_id: str, *, pull_from: str | None = None
) -> tuple[float, int]:
    """(seconds to the first token, cached prompt tokens) on this worker."""
    seq_id = name_on(client, worker_id)
    done = client.generate(
        token_ids=token_ids, max_tokens=1, temperature=0.0, ignore_eos=True, seq_id=seq_id, pull_from=pull_from
    ).result()
    return done.timings.ttft_s, done.usage.cached_tokens


def _peers(client: Client, worker_id: str) -> PeerStats:
    (view,) = [view for view in client.stats().workers if view.worker_id == worker_id]
    if view.stats is None or not view.stats.peers.pulls:
        raise RuntimeError("the worker reports no pulls")
    return view.stats.peers
