"""Traces made up by stated models, deterministic by seed: kinds of traffic that differ in what they share.

    agents   a few long system prompts, sessions of many short turns, each turn the last one and some more
    rag      a short system prompt, some of many documents (Zipf), most popular first, then a question
    chat     sessions that think between turns; lengths lognormal
    bursts   chat, with a rate that swings between a tenth and twice its mean
    heavy    chat, with Pareto lengths (shape 1.3)
    hot      half of all requests share one beginning of 24k tokens, the others nothing
    alone    nobody shares anything

A prompt is a list of parts (whose content, how many tokens); equal parts at equal places make equal blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from itertools import accumulate, count
from math import pi, sin
from typing import TypeAlias

from bus.errors import BadArgument
from kvcache.hashing import ROUTING_NODE_BYTES
from kvcache.simulate.traces import Arrival, block_ends

BLOCK_TOKENS = 512
DURATION_S = 1200.0
MAX_TOKENS = 128_000
CONTINUES = 0.5
"""Of `with_prefixes`: the share of requests that go on from an earlier one, as in published chat traces."""
RECENT = 256
SPREAD_S = 60.0

Part: TypeAlias = tuple[int, int]
Turn: TypeAlias = tuple[float, list[Part], int]
"""When, what, and how many tokens come back."""


def chain_of(parts: Sequence[Part]) -> tuple[bytes, ...]:
    """The nodes of a prompt: each names its block's content and all before it."""
    nodes: list[bytes] = []
    digest, room = blake2b(digest_size=ROUTING_NODE_BYTES), BLOCK_TOKENS
    for content, num_tokens in parts:
        start = 0
        while start < num_tokens:
            taken = min(room, num_tokens - start)
            digest.update(b"%d:%d:%d;" % (content, start, taken))
            start += taken
            room -= taken
            if not room:
                nodes.append(digest.digest())
                digest, room = blake2b(nodes[-1], digest_size=ROUTING_NODE_BYTES), BLOCK_TOKENS
    if room < BLOCK_TOKENS:
        nodes.append(digest.digest())
    return tuple(nodes)


def synthetic(kind: str, seed: int = 0) -> list[Arrival]:
    """20 minutes of traffic of one kind. Raises BadArgument that names the kinds there are."""
    if kind not in KINDS:
        raise BadArgument(f"there is no synthetic trace {kind!r}; use one of {', '.join(KINDS)}")
    turns = sorted(KINDS[kind](random.Random(f"{kind} {seed}")), key=lambda turn: turn[0])
    return [_arrival(*turn) for turn in turns if turn[0] < DURATION_S]


def multiplied(arrivals: Sequence[Arrival], times: int) -> list[Arrival]:
    """As many users as `times` such traces have, who share nothing with those of another: for clusters of any size.

    Each copy begins at its own moment of the first minute, drawn from its number, so that they do not keep step.
    """
    made = list(arrivals)
    for copy in range(1, times):
        later = random.Random(copy).uniform(0.0, SPREAD_S)
        made += (replace(it, at=it.at + later, chain=_renamed(it.chain, copy)) for it in arrivals)
    return sorted(made, key=lambda arrival: arrival.at)


def with_prefixes(arrivals: Sequence[Arrival], seed: int = 0) -> list[Arrival]:
    """The arrivals with prefixes that their trace does not tell.

    Half of them (`CONTINUES`) go on from one of the last 256 requests that are shorter than they are, the more recent
    the likelier (each step back halves it every 32): they share all of its prompt. The others share nothing.
    """
    rng = random.Random(seed)
    recent: list[tuple[int, list[Part]]] = []
    result = []
    for number, arrival in enumerate(arrivals):
        parts: list[Part] = []
        shorter = [known for known in recent if known[0] < arrival.num_tokens]
        if shorter and rng.random() < CONTINUES:
            back = min(len(shorter) - 1, int(rng.expovariate(1 / 46)))
            parts = list(shorter[-1 - back][1])
        parts.append((number, arrival.num_tokens - sum(tokens for _, tokens in parts)))
        recent = [*recent[1 - RECENT :], (arrival.num_tokens, parts)]
        result.append(_arrival(arrival.at, parts, arrival.output_tokens))
    return result


def _renamed(chain: Sequence[bytes], copy: int) -> tuple[bytes, ...]:
    """Nodes that are equal where these are, and equal to those of no other copy."""
    mask = copy << (8 * (ROUTING_NODE_BYTES - 2))
    return tuple((int.from_bytes(node, "big") ^ mask).to_bytes(ROUTING_NODE_BYTES, "big") for node in chain)


def _arrival(at: float, parts: Sequence[Part], output_tokens: int) -> Arrival:
    num_tokens = sum(tokens for _, tokens in parts)
    return Arrival(at, num_tokens, output_tokens, chain_of(parts), block_ends(num_tokens, BLOCK_TOKENS))


def _poisson(rng: random.Random, rate: float, swing: Callable[[float], float] = lambda at: 1.0) -> Iterator[float]:
    """Times of arrivals at `rate` a second; `swing` scales the rate over time, by at most 2 (thinning)."""
    at = 0.0
    while at < DURATION_S:
        at += rng.expovariate(2 * rate)
        if rng.random() < swing(at) / 2:
            yield at


def _sessions(
    rng: random.Random,
    starts: Iterator[float],
    first: Callable[[], list[Part]],
    more: Callable[[], int],
    pause_s: float,
) -> Iterator[Turn]:
    """Each goes on with probability 0.8 after an answer, a pause and something new to say."""
    fresh = count(1_000_000)
    for start in starts:
        at, parts = start, first()
        while sum(tokens for _, tokens in parts) < MAX_TOKENS:
            output = 1 + int(rng.expovariate(1 / 250))
            yield at, list(parts), output
            if rng.random() > 0.8:
                break
            at += rng.expovariate(1 / pause_s) + 0.03 * output
            parts = [*parts, (next(fresh), output + max(1, more()))]


def _agents(rng: random.Random) -> Iterator[Turn]:
    own = count(1000)
    return _sessions(
        rng,
        _poisson(rng, 3.0),
        lambda: [(rng.randrange(6), 6000), (next(own), 200 + int(rng.expovariate(1 / 2000)))],
        lambda: int(rng.expovariate(1 / 1500)),
        pause_s=4.0,
    )


def _rag(rng: random.Random) -> Iterator[Turn]:
    weights = list(accumulate(1 / rank for rank in range(1, 2001)))
    sizes = [500 + int(rng.expovariate(1 / 3500)) for _ in weights]
    own = count(10_000)
    for at in _poisson(rng, 5.0):
        documents = sorted(set(rng.choices(range(len(weights)), cum_weights=weights, k=3)))
        parts = [(9999, 600), *((number, sizes[number]) for number in documents), (next(own), 100)]
        yield at, parts, 1 + int(rng.expovariate(1 / 200))


def _chat(rng: random.Random, swing: Callable[[float], float] = lambda at: 1.0) -> Iterator[Turn]:
    own = count()
    return _sessions(
        rng,
        _poisson(rng, 1.5, swing),
        lambda: [(next(own), min(MAX_TOKENS, 1 + int(rng.lognormvariate(8.3, 1.1))))],
        lambda: int(rng.lognormvariate(6.5, 1.2)),
        pause_s=25.0,
    )


def _bursts(rng: random.Random) -> Iterator[Turn]:
    return _chat(rng, lambda at: 1.05 + 0.95 * sin(2 * pi * at / 300.0))


def _heavy(rng: random.Random) -> Iterator[Turn]:
    own = count()
    return _sessions(
        rng,
        _poisson(rng, 1.1),
        lambda: [(next(own), min(MAX_TOKENS - 1, int(2000 * rng.paretovariate(1.3))))],
        lambda: min(40_000, int(300 * rng.paretovariate(1.3))),
        pause_s=20.0,
    )


def _hot(rng: random.Random) -> Iterator[Turn]:
    for number, at in enumerate(_poisson(rng, 6.0)):
        shared = [(0, 24_000)] if rng.random() < 0.5 else []
        yield at, [*shared, (1 + number, 200 + int(rng.expovariate(1 / 4000)))], 1 + int(rng.expovariate(1 / 200))


def _alone(rng: random.Random) -> Iterator[Turn]:
    for number, at in enumerate(_poisson(rng, 6.0)):
        yield at, [(number, min(MAX_TOKENS, 1 + int(rng.lognormvariate(8.3, 1.0))))], 1 + int(rng.expovariate(1 / 200))


KINDS: dict[str, Callable[[random.Random], Iterator[Turn]]] = {
    "agents": _agents,
    "rag": _rag,
    "chat": _chat,
    "bursts": _bursts,
    "heavy": _heavy,
    "hot": _hot,
    "alone": _alone,
}
