"""`kvcache bench reuse`: time to the first token of a prompt, cold and with most of it cached.

The whole path: client, broker, one worker, the real model. Cold prompts are random tokens never sent
before; a warm one goes on with the same sequence, shares its first 1,008 tokens and differs after that.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from kvcache.bench.report import Report, report, row
from kvcache.client import Client
from kvcache.local import cluster

RUNS = 5
PROMPT_TOKENS = 1024
CACHED_TOKENS = 1008
VOCABULARY = range(1000, 40_000)


def run(*, quick: bool, progress: Callable[[str], None]) -> Report:
    """Five cold and warm prompts in turn; `quick` leaves out the second length."""
    rows = []
    notes: list[str] = []
    progress("starting a broker and a worker, loading SmolLM2")
    with cluster(1) as url, Client(url, timeout=300.0) as client:
        draw = random.Random(17)
        _first_token(client, draw.choices(VOCABULARY, k=64), "warm-up")
        for length, cached, goal in ((PROMPT_TOKENS, CACHED_TOKENS, 10.0), (4096, 4080, None))[: 1 if quick else 2]:
            cold, warm = [], []
            for index in range(RUNS):
                progress(f"{length} tokens, run {index + 1} of {RUNS}")
                prompt = draw.choices(VOCABULARY, k=length)
                seconds, hit = _first_token(client, prompt, f"reuse-{length}-{index}")
                if hit:
                    raise RuntimeError(f"{hit} tokens of a prompt that was never sent were cached")
                cold.append(seconds)
                tail = draw.choices(VOCABULARY, k=length - cached)
                seconds, hit = _first_token(client, prompt[:cached] + tail, f"reuse-{length}-{index}")
                if hit != cached:
                    raise RuntimeError(f"{hit} tokens were cached where {cached} could be")
                warm.append(seconds)
            name = f"first token, {length} tokens"
            rows.append(row(f"{name}, cold", [1000 * s for s in cold], "ms"))
            rows.append(row(f"{name}, {cached} cached", [1000 * s for s in warm], "ms"))
            rows.append(
                row(f"{name}, speedup", [c / w for c, w in zip(cold, warm, strict=True)], "x", goal=goal, on="value")
            )
            notes = [f"SmolLM2-135M-Instruct, {_how(client)}, one worker, through the broker"]
    return report("reuse", rows, notes)


def _how(client: Client) -> str:
    """The precision and the runner, by the worker's own figures."""
    models = [model for view in client.stats().workers if view.stats for model in view.stats.models]
    return ", ".join(f"{model.dtype} on {model.device} ({model.runner})" for model in models if model.state == "ready")


def _first_token(client: Client, token_ids: list[int], seq_id: str) -> tuple[float, int]:
    """(seconds to the first token, cached prompt tokens)."""
    done = client.generate(token_ids=token_ids, max_tokens=1, temperature=0.0, ignore_eos=True, seq_id=seq_id).result()
    return done.timings.ttft_s, done.usage.cached_tokens
