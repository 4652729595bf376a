"""Other routers' rules, written anew from their documentation and papers, to compare ours with.

Each sees what its original sees, and sees it as well as it ever could: exact indexes, loads counted at dispatch.
Constants are the originals' defaults. All share the ledger and the learned rates where they estimate times.

    random, hash_1, hash_2   no state; the ring over the first one or two nodes of the prompt
    sglang       SGLang router, `cache_aware`: threshold on the match, shortest queue when out of balance
    llm_d        llm-d scheduler: weighted scores for prefix, queue and KV use, 3 : 2 : 2
    dynamo       NVIDIA Dynamo KV router: blocks to prefill plus blocks in use, fewest wins
    mooncake     Qin et al. 2025 (FAST '25), algorithm 1: least estimated TTFT, with a transfer if far better
    least_ttft   least estimated time to first token; with pulls, `least_ttft_pull`
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping

from kvcache.ring import HashRing
from kvcache.routing.index import NodeIndex
from kvcache.routing.keys import RoutingKey
from kvcache.routing.policies import consistent_hash
from kvcache.routing.views import Belief, Choice, Pull, Refusal, Request
from kvcache.simulate.routers import Router, Stateless
from kvcache.simulate.traces import Arrival
from kvcache.simulate.worker import Job

Beliefs = Mapping[str, Belief]


class Random(Stateless):
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def choose(self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Beliefs) -> Choice | Refusal:
        return Choice(self._random.choice(ring.workers), "random")


class FixedDepth(Stateless):
    """Consistent hashing of the first `depth` nodes, whoever shares them."""

    def __init__(self, depth: int) -> None:
        self._depth = depth

    def choose(self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Beliefs) -> Choice | Refusal:
        node = arrival.chain[min(self._depth, len(arrival.chain)) - 1]
        return consistent_hash(Request(RoutingKey(node, "fixed depth")), ring, beliefs)


class SGLang(Stateless):
    """The router's own tree of what it sent where stands for the caches; sizes count nodes ever sent, as there."""

    THRESHOLD, ABSOLUTE, RELATIVE = 0.3, 64, 1.5

    def __init__(self) -> None:
        self._tree = NodeIndex()
        self._sizes: Counter[str] = Counter()

    def choose(self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Beliefs) -> Choice | Refusal:
        loads = {worker: beliefs[worker].inflight for worker in ring.workers}
        least, most = min(loads.values()), max(loads.values())
        if most - least > self.ABSOLUTE and most > self.RELATIVE * least:
            return Choice(min(loads, key=lambda worker: loads[worker]), "sglang: shortest queue")
        matched = self._tree.lookup(arrival.chain)
        best = max(matched, key=lambda worker: matched[worker], default="")
        if best and matched[best] / len(arrival.chain) > self.THRESHOLD:
            return Choice(best, "sglang: longest match")
        return Choice(
            min(ring.workers, key=lambda worker: (self._sizes[worker], loads[worker])), "sglang: smallest tree"
        )

    def dispatched(self, job: Job, worker: str) -> None:
        known = self._tree.lookup(job.arrival.chain).get(worker, 0)
        self._sizes[worker] += len(job.arrival.chain) - known
        self._tree.stored(worker, job.arrival.chain)

    def left(self, worker: str) -> None:
        self._tree.clear(worker)
        del self._sizes[worker]


class _CountsTokens(Stateless):
    """Keeps the tokens of requests in flight, and of those without a first token, by worker."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._waiting: Counter[str] = Counter()
        self._num_waiting: Counter[str] = Counter()
        self._to_prefill: dict[int, int] = {}
        self._chosen_prefill = 0

    def dispatched(self, job: Job, worker: str) -> None:
        self._held[worker] += job.arrival.num_tokens
        self._waiting[worker] += self._chosen_prefill
        self._num_waiting[worker] += 1
        self._to_prefill[job.number] = self._chosen_prefill

    def first_token(self, job: Job, worker: str) -> None:
        self._waiting[worker] -= self._to_prefill.pop(job.number)
        self._num_waiting[worker] -= 1

    def ended(self, job: Job, worker: str) -> None:
        self._held[worker] -= job.arrival.num_tokens

    def left(self, worker: str) -> None:
        for counter in (self._held, self._waiting, self._num_waiting):
            del counter[worker]


class LlmD(_CountsTokens):
    """Queue and KV use are scraped from workers' metrics, and what came in between is not seen; prefixes are."""

    WEIGHTS = (3.0, 2.0, 2.0)
    SCRAPE_S = 0.05

    def __init__(self, cache_tokens: int) -> None:
        super().__init__()
        self._cache_tokens = cache_tokens
        self._scraped_at = float("-inf")
        self._queues: dict[str, int] = {}
        self._used: dict[str, int] = {}

    def choose(self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Beliefs) -> Choice | Refusal:
        if request.now - self._scraped_at >= self.SCRAPE_S:
            self._scraped_at, self._queues, self._used = request.now, dict(self._num_waiting), dict(self._held)
        queues = {worker: self._queues.get(worker, 0) for worker in ring.workers}
        least = min(queues.values())
        spread = max(queues.values()) - least

        def score(worker: str) -> float:
            prefix = request.hits.get(worker, 0) / arrival.num_tokens
            queue = 1.0 - (queues[worker] - least) / spread if spread else 1.0
            room = 1.0 - min(1.0, self._used.get(worker, 0) / self._cache_tokens)
            return self.WEIGHTS[0] * prefix + self.WEIGHTS[1] * queue + self.WEIGHTS[2] * room

        return Choice(max(ring.workers, key=lambda worker: (score(worker), -beliefs[worker].turn)), "llm_d: best score")


class Dynamo(_CountsTokens):
    """Blocks of tokens: their size cancels out, so tokens are counted here."""

    def choose(self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Beliefs) -> Choice | Refusal:
        def cost(worker: str) -> float:
            to_prefill = arrival.num_tokens - request.hits.get(worker, 0)
            return to_prefill + self._waiting[worker] + self._held[worker] + arrival.num_tokens

        worker = min(ring.workers, key=lambda worker: (cost(worker), beliefs[worker].turn))
        self._chosen_prefill = arrival.num_tokens - request.hits.get(worker, 0)
        return Choice(worker, "dynamo: fewest blocks")


class Mooncake(Stateless):
    """A transfer is considered where the best match is more than 4 times as long as the worker's own."""

    BALANCING_THRESHOLD = 4.0

    def choose(self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Beliefs) -> Choice | Refusal:
        source = max(request.hits, key=lambda worker: request.hits[worker], default="")
        best = request.hits.get(source, 0)

        def option(worker: str) -> tuple[float, Pull | None]:
            belief, own = beliefs[worker], request.hits.get(worker, 0)
            queue_s = max(0.0, belief.queue_s(request.now))
            if best <= self.BALANCING_THRESHOLD * own or belief.rates.pull_s == float("inf"):
                return queue_s + belief.rates.prefill_s(arrival.num_tokens, own), None
            pull_s = belief.rates.pull_s * (best - own)
            return queue_s + pull_s + belief.rates.prefill_s(arrival.num_tokens, best), Pull(source, best)

        options = {worker: option(worker) for worker in ring.workers}
        worker = min(ring.workers, key=lambda worker: (options[worker][0], beliefs[worker].turn))
        return Choice(worker, "mooncake: least TTFT", options[worker][1])


class LeastTTFT(Stateless):
    def __init__(self, can_pull: bool) -> None:
        self._can_pull = can_pull

    def choose(self, arrival: Arrival, request: Request, ring: HashRing, beliefs: Beliefs) -> Choice | Refusal:
        source = max(request.hits, key=lambda worker: request.hits[worker], default="")
        best = request.hits.get(source, 0)

        def option(worker: str) -> tuple[float, Pull | None]:
            belief, own = beliefs[worker], request.hits.get(worker, 0)
            queue_s = max(0.0, belief.queue_s(request.now))
            alone = queue_s + belief.rates.prefill_s(arrival.num_tokens, own)
            if not self._can_pull or best <= own:
                return alone, None
            helped = queue_s + belief.rates.pull_s * (best - own) + belief.rates.prefill_s(arrival.num_tokens, best)
            return (helped, Pull(source, best)) if helped < alone else (alone, None)

        options = {worker: option(worker) for worker in ring.workers}
        worker = min(ring.workers, key=lambda worker: (options[worker][0], beliefs[worker].turn))
        return Choice(worker, "least_ttft: least estimate", options[worker][1])


def rivals(seed: int, cache_tokens: int) -> dict[str, Callable[[], Router]]:
    """How to make each rival, by name."""
    return {
        "random": lambda: Random(seed),
        "hash_1": lambda: FixedDepth(1),
        "hash_2": lambda: FixedDepth(2),
        "sglang": SGLang,
        "llm_d": lambda: LlmD(cache_tokens),
        "dynamo": Dynamo,
        "mooncake": Mooncake,
        "least_ttft": lambda: LeastTTFT(can_pull=False),
        "least_ttft_pull": lambda: LeastTTFT(can_pull=True),
    }
