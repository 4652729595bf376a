"""`kvcache simulate TRACE --check SECONDS`: what the simulator foretells, against what real workers then do.

A trace of a big cluster is made small: all lengths are divided by one number, and its beginning is replayed at the
speed at which computing everything would keep the workers busy for `LOAD` of the time. Prompts are made of token ids
drawn from the trace's own nodes, so they share what the trace's prompts share; the simulator gets the same prompts,
with the chains that clients send for them. Costs are measured first, on the same workers; nothing is fitted after.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from bus.errors import BadArgument, InternalError, KVCacheError
from bus.stats import PeerStats
from kvcache.client import AsyncClient, Client
from kvcache.client.results import Token
from kvcache.client.sync import Generation
from kvcache.hashing import ROUTING_BLOCK_TOKENS, ROUTING_DEPTHS, ROUTING_NODE_BYTES, routing_chain
from kvcache.local import cluster, name_on
from kvcache.routing.policies import DEFAULT_POLICY, POLICIES
from kvcache.simulate.calibrate import VOCABULARY, calibrate
from kvcache.simulate.costs import Costs
from kvcache.simulate.routers import PolicyRouter
from kvcache.simulate.simulation import Result, Setup, Simulation
from kvcache.simulate.traces import Arrival
from kvcache.simulate.worker import Engine

MODEL = "smollm2"
MOST_TOKENS = 8000
"""That a prompt of this model may have, with room for its output."""
LOAD = 0.3
"""Low: on a machine that others use too, what was calibrated in a quiet moment is soon too much."""
LINK_TOKENS = 1024
LINK_RUNS = 3
BESIDE_TOKENS = 512
BESIDE_RUNS = 5
NUM_DECODES = 4
DECODED_TOKENS = 256
"""By each of those beside which a prefill is timed: they are stopped when it is over."""
BLOCK_TOKENS = 32
"""The workers' own."""
ENGINE = Engine(step_tokens=256, block_tokens=BLOCK_TOKENS)
"""As the workers are started."""
STATUS_S = 2.5
"""Workers report their figures each second."""
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request of the small trace: what the simulator sees of it, and its tokens."""

    arrival: Arrival
    token_ids: list[int]


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """hit, pulled: shares of prompt tokens, hits include what was pulled. Times to first token in seconds."""

    hit: float
    pulled: float
    mean_s: float
    p50_s: float
    p90_s: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """num_tokens: of all prompts. busy: computing all of it, as a share of the workers' time."""

    num_requests: int
    num_tokens: int
    num_workers: int
    divide: int
    span_s: float
    busy: float
    costs: Costs
    predicted: Figures
    measured: Figures


def check(
    trace: Sequence[Arrival], seconds: float, divide: int, num_workers: int, say: Callable[[str], None]
) -> Report:
    """Start workers, measure their costs, foretell and replay. Raises BadArgument for a trace that does not fit."""
    prompts = [divided(arrival, divide) for arrival in trace]
    say(f"starting a broker and {num_workers} workers, loading {MODEL}")
    with (
        cluster(num_workers, "--max-num-batched-tokens", str(ENGINE.step_tokens)) as url,
        Client(url, timeout=TIMEOUT_S) as client,
    ):
        costs = calibrate(client, say=say)
        say("prefills beside decodes, and beside other workers")
        decode_s, crowding = _beside(client, costs)
        costs = msgspec.structs.replace(costs, decode_s=decode_s, crowding=crowding)
        say("the link between two workers")
        costs = msgspec.structs.replace(costs, pull_s=_link_s(client), pull_start_s=0.0)
        prompts = paced(prompts, costs, seconds, num_workers)
        names = tuple(sorted(view.worker_id for view in client.workers()))
        setup = Setup(
            num_workers=num_workers, cache_tokens=_cache_tokens(client), costs=costs, names=names, engine=ENGINE
        )
        before = _pulled_tokens(client)
        say(f"{len(prompts)} requests in {prompts[-1].arrival.at:.0f} s")
        served = asyncio.run(_replay(url, prompts))
        time.sleep(STATUS_S)
        pulled = _pulled_tokens(client) - before
    arrivals = [prompt.arrival for prompt in prompts]
    predicted = Simulation(arrivals, setup, lambda: PolicyRouter(POLICIES[DEFAULT_POLICY])).run()
    num_tokens = sum(arrival.num_tokens for arrival in arrivals)
    return Report(
        num_requests=len(prompts),
        num_tokens=num_tokens,
        num_workers=num_workers,
        divide=divide,
        span_s=arrivals[-1].at,
        busy=sum(costs.rates.prefill_s(it.num_tokens, 0) for it in arrivals) / num_workers / arrivals[-1].at,
        costs=costs,
        predicted=_predicted(predicted, num_tokens),
        measured=_figures([ttft for ttft, _ in served], sum(hit for _, hit in served), pulled, num_tokens),
    )


def divided(arrival: Arrival, divide: int) -> Prompt:
    """The request with all its lengths divided. Raises BadArgument if the model could not take it."""
    token_ids: list[int] = []
    for node, end in zip(arrival.chain, arrival.ends, strict=True):
        token_ids += random.Random(node).choices(VOCABULARY, k=max(1, round(end / divide)) - len(token_ids))
    token_ids = token_ids or random.Random(arrival.at).choices(VOCABULARY, k=1)
    if len(token_ids) > MOST_TOKENS:
        raise BadArgument(
            f"a prompt of {len(token_ids)} tokens is too long for {MODEL}; --divide by more than {divide}"
        )
    chain = routing_chain(token_ids)
    ends = tuple(min(len(token_ids), depth * ROUTING_BLOCK_TOKENS) for depth in ROUTING_DEPTHS[: len(chain)])
    output = max(1, round(arrival.output_tokens / divide))
    fine = token_nodes(token_ids, dict(zip(ends, chain, strict=True)))
    return Prompt(Arrival(arrival.at, len(token_ids), output, chain, ends, fine), token_ids)


def token_nodes(token_ids: Sequence[int], known: Mapping[int, bytes]) -> tuple[bytes, ...]:
    """A node for each token and all before it, because workers copy the beginnings of blocks too.

    known: the nodes that end at so many tokens and are named already.
    """
    digest, nodes = blake2b(digest_size=ROUTING_NODE_BYTES), list[bytes]()
    for end, token_id in enumerate(token_ids, 1):
        digest.update(token_id.to_bytes(4, "little"))
        nodes.append(known.get(end) or digest.digest())
    return tuple(nodes)


def paced(prompts: Sequence[Prompt], costs: Costs, seconds: float, num_workers: int) -> list[Prompt]:
    """As many of them as make `LOAD` for so long, at the times at which they do. Raises BadArgument if none is left."""
    taken, work_s = list[Prompt](), 0.0
    for prompt in prompts:
        work_s += costs.rates.prefill_s(prompt.arrival.num_tokens, 0)
        if work_s > LOAD * seconds * num_workers:
            break
        taken.append(prompt)
    span_s = taken[-1].arrival.at - taken[0].arrival.at if taken else 0.0
    if span_s <= 0.0:
        raise BadArgument(f"{seconds:.0f} s are too short for this trace: no two moments of it fit in")
    work_s = sum(costs.rates.prefill_s(prompt.arrival.num_tokens, 0) for prompt in taken)
    stretch = work_s / LOAD / num_workers / span_s
    first = taken[0].arrival.at
    return [replace(it, arrival=replace(it.arrival, at=(it.arrival.at - first) * stretch)) for it in taken]


def show(report: Report, console: Console) -> None:
    """What was foretold beside what came, and by how much it was wrong."""
    table = Table(
        title=f"{report.num_requests} requests in {report.span_s:.0f} s, {report.num_tokens:,} prompt tokens "
        f"(lengths divided by {report.divide}), {report.num_workers} workers, load without a cache {report.busy:.2f}",
        title_justify="left",
    )
    for name in ("", "predicted", "measured", "error"):
        table.add_column(name, justify="right" if name else "left")
    for name in Figures.__struct_fields__:
        predicted, measured = getattr(report.predicted, name), getattr(report.measured, name)
        error = f"{predicted / measured - 1:+.0%}" if measured else "-"
        table.add_row(name.replace("_s", ", s"), f"{predicted:.3f}", f"{measured:.3f}", error)
    console.print(table)


async def _replay(url: str, prompts: Sequence[Prompt]) -> list[tuple[float, int]]:
    """(seconds to the first token, cached tokens) of each."""
    try:
        async with AsyncClient(url, timeout=TIMEOUT_S) as client, asyncio.TaskGroup() as group:
            begun_at = time.monotonic()
            tasks = [group.create_task(_serve(client, prompt, begun_at)) for prompt in prompts]
    except* KVCacheError as errors:
        raise InternalError(f"a request failed: {errors.exceptions[0]}") from None
    return [task.result() for task in tasks]


async def _serve(client: AsyncClient, prompt: Prompt, begun_at: float) -> tuple[float, int]:
    arrival = prompt.arrival
    await asyncio.sleep(begun_at + arrival.at - time.monotonic())
    done = await client.generate(
        token_ids=prompt.token_ids, max_tokens=arrival.output_tokens, temperature=0.0, ignore_eos=True
    ).result()
    return done.timings.ttft_s, done.usage.cached_tokens


def _link_s(client: Client) -> float | None:
    """Seconds to pull a token's KV; None if the only worker has nobody to pull from."""
    names = sorted(view.worker_id for view in client.workers())
    if len(names) < 2:
        return None
    draw = random.Random(1)
    for _ in range(LINK_RUNS):
        prompt = draw.choices(VOCABULARY, k=LINK_TOKENS)
        for worker, source in ((names[0], None), (names[1], names[0])):
            seq_id = name_on(client, worker)
            client.generate(token_ids=prompt, max_tokens=1, seq_id=seq_id, pull_from=source).result()
    time.sleep(STATUS_S)
    peers = _peers(client)[names[1]]
    if not peers.whole_tokens:
        raise InternalError(f"no pull came whole: {peers.failures}")
    return peers.pulled_s / peers.whole_tokens


def _beside(client: Client, costs: Costs) -> tuple[float, float]:
    """What a prefill's token costs more for each sequence that decodes beside it, in seconds; and the share by which
    all takes longer for each other worker that is busy.
    """
    names = sorted(view.worker_id for view in client.workers())
    draw = random.Random(2)

    def begin(worker: str, num_tokens: int, output: int) -> Generation:
        seq_id, prompt = name_on(client, worker), draw.choices(VOCABULARY, k=num_tokens)
        return client.generate(
            token_ids=prompt, max_tokens=output, seq_id=seq_id, policy="consistent_hash", ignore_eos=True
        )

    def seconds(*workers: str) -> float:
        begun = [begin(worker, BESIDE_TOKENS, 1) for worker in workers]
        return statistics.median(it.result().timings.prefill_ms for it in begun) / 1000

    # In turns, because what else runs on this machine comes and goes.
    runs = [(seconds(names[0]), seconds(*names)) for _ in range(BESIDE_RUNS)]
    alone_s, together_s = map(statistics.median, zip(*runs, strict=True))
    decodes = [begin(names[0], BLOCK_TOKENS, DECODED_TOKENS) for _ in range(NUM_DECODES)]
    for it in decodes:
        next(event for event in it if isinstance(event, Token))
    beside_s = statistics.median(seconds(names[0]) for _ in range(BESIDE_RUNS))
    for it in decodes:
        it.cancel()
    others = max(1, len(names) - 1)
    return max(0.0, beside_s - alone_s) / NUM_DECODES / BESIDE_TOKENS, max(0.0, together_s / alone_s - 1) / others


def _peers(client: Client) -> dict[str, PeerStats]:
    return {view.worker_id: view.stats.peers for view in client.stats().workers if view.stats is not None}


def _pulled_tokens(client: Client) -> int:
    return sum(peers.pulled_tokens for peers in _peers(client).values())


def _cache_tokens(client: Client) -> int:
    """That each worker has room for, by the smallest."""
    pools = [model.pool for view in client.stats().workers if view.stats is not None for model in view.stats.models]
    return min(pool.num_blocks * pool.block_size for pool in pools if pool.num_blocks)


def _predicted(result: Result, num_tokens: int) -> Figures:
    outcomes = result.outcomes
    ttft = [outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]
    hit, pulled = (sum(getattr(outcome, name) for outcome in outcomes) for name in ("hit_tokens", "pulled_tokens"))
    return _figures(ttft, hit, pulled, num_tokens)


def _figures(ttft: Sequence[float], hit: int, pulled: int, num_tokens: int) -> Figures:
    p50_s, p90_s = np.quantile(ttft, [0.5, 0.9])
    return Figures(
        hit=hit / num_tokens,
        pulled=pulled / num_tokens,
        mean_s=float(np.mean(ttft)),
        p50_s=float(p50_s),
        p90_s=float(p90_s),
    )
