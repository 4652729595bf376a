"""`kvcache bench router`: what one placement costs a broker, and how much memory it takes to know who holds what.

Requests are prompts of 12,288 tokens whose chain is given, as it is on the wire. Half of each chain is held by some
workers, the rest is new. A decision is what `Placement.place` does: the key, the lookup, what is being computed, the
beliefs (one worker has changed since the last time), the policy. Accounting is what dispatch and end add to that.
"""

from __future__ import annotations

import random
import secrets
import statistics
import time
import tracemalloc
from collections.abc import Callable

from bus import messages as m
from bus import wire
from kvcache.bench.report import Report, report, row
from kvcache.broker.calls import Calls
from kvcache.broker.journal import Journal
from kvcache.broker.knowledge import Knowledge
from kvcache.broker.members import Client, Worker, Workers
from kvcache.broker.moves import Moves
from kvcache.broker.placement import Placement
from kvcache.broker.sequences import Sequences
from kvcache.hashing import ROUTING_BLOCK_TOKENS, ROUTING_DEPTHS, ROUTING_NODE_BYTES, TOKEN_BYTES
from kvcache.routing.index import NodeIndex
from kvcache.routing.policies import DEFAULT_POLICY

RUNS = 7
PROMPT_TOKENS = 12_288
CHAIN_NODES = next(n for n, depth in enumerate(ROUTING_DEPTHS, 1) if depth * ROUTING_BLOCK_TOKENS >= PROMPT_TOKENS)
CHAINS_PER_WORKER = 20
SIZES = ((8, 100.0), (64, 250.0), (1000, None))
NOW = 1000.0


class Bench:
    """A broker's placement over workers that have told what they hold; every chain is held by 1 to 8 of them."""

    def __init__(self, num_workers: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._workers = Workers(1e9, 1_000_000)
        members = [_member(number) for number in range(num_workers)]
        for worker in members:
            self._workers.by_id[worker.id] = self._workers.by_link[worker.link] = worker
        self._workers.changed()
        self.knowledge = Knowledge(self._workers)
        sequences = Sequences(self._workers, wall_ms=0, now=NOW)
        journal = Journal(_new_id, is_detailed=False, is_tracing=False)
        moves = Moves(self._workers, sequences, journal, _new_id, lambda worker_id, now: False)
        self.placement = Placement(DEFAULT_POLICY, self._workers, self.knowledge, sequences, moves)
        self._chains = [self._chain() for _ in range(num_workers * CHAINS_PER_WORKER // 4)]
        held: dict[str, list[bytes]] = {worker.id: [] for worker in members}
        for chain in self._chains:
            for worker in self._random.sample(members, self._random.randint(1, min(8, num_workers))):
                held[worker.id] += chain
        for worker in members:
            self.knowledge.joined(worker, NOW)
            self._tell(worker, held[worker.id])

    def requests(self, count: int) -> list[m.Generate]:
        """Prompts that begin like one that is held."""
        half = CHAIN_NODES // 2
        return [self._request([*self._random.choice(self._chains)[:half], *self._chain()[half:]]) for _ in range(count)]

    def decide_us(self, count: int) -> float:
        """The median time of a decision."""
        times = []
        for number, request in enumerate(self.requests(count)):
            self.knowledge.touch(self._workers.by_id[self._workers.ring.workers[number % len(self._workers.ring)]])
            start = time.perf_counter()
            self.placement.place("tenant", request, NOW)
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1e6

    def account_us(self, count: int) -> float:
        """The median time of what is noted of a request at its dispatch and its end."""
        calls, client, times = Calls(), Client(b"c", b"", bytes(16), "tenant", NOW), []
        for number, request in enumerate(self.requests(count)):
            place = self.placement.place("tenant", request, NOW)
            call = calls.begin(client, place.worker, number.to_bytes(16, "big"), NOW + 60, None)
            assert place.prompt is not None
            start = time.perf_counter()
            self.knowledge.dispatched(call, request, place.prompt, place.choice, NOW)
            self.knowledge.ended(call)
            times.append(time.perf_counter() - start)
            calls.end(call)
        return statistics.median(times) * 1e6

    def _tell(self, worker: Worker, nodes: list[bytes]) -> None:
        data = b"".join(nodes)
        runs = (m.NodeRun("tenant", True, len(nodes)),) if nodes else ()
        self.knowledge.reported(worker, m.NodesHeld(after=0, part=0, is_last=True, runs=runs, payload=()), data, NOW)

    def _request(self, chain: list[bytes]) -> m.Generate:
        return m.Generate(
            req_id=bytes(16),
            attempt=0,
            deadline_ms=60_000,
            stream_id=bytes(16),
            epoch=0,
            kind=m.PromptKind.TOKENS,
            sampling=m.Sampling(),
            chain=tuple(chain),
            payload=(m.Part(nbytes=PROMPT_TOKENS * TOKEN_BYTES, crc=0),),
        )

    def _chain(self) -> list[bytes]:
        return [self._random.randbytes(ROUTING_NODE_BYTES) for _ in range(CHAIN_NODES)]


def run(*, quick: bool, progress: Callable[[str], None]) -> Report:
    """Each run has other workers, chains and requests."""
    count, num_nodes = (100, 100_000) if quick else (500, 1_000_000)
    runs = 3 if quick else RUNS
    rows = []
    for num_workers, goal in SIZES:
        decide, account = [], []
        for index in range(runs if num_workers < 1000 else 3):
            progress(f"{num_workers} workers, run {index + 1}")
            bench = Bench(num_workers, index)
            bench.decide_us(count // 4)
            decide.append(bench.decide_us(count))
            account.append(bench.account_us(count))
        rows.append(row(f"decision, {num_workers} workers", decide, "us", goal=goal, sense="<=", on="value"))
        rows.append(row(f"accounting, {num_workers} workers", account, "us"))
    for num_workers in (1, 64, 1000):
        progress(f"memory of {num_nodes:,} nodes of {num_workers} workers")
        rows.append(
            row(
                f"memory per indexed node, {num_nodes:,} nodes, {num_workers} workers",
                [_bytes_per_node(num_nodes, num_workers)],
                "bytes",
                goal=200.0,
                sense="<=",
                on="value",
            )
        )
    notes = [f"a prompt of {PROMPT_TOKENS:,} tokens has {CHAIN_NODES} nodes; policy {DEFAULT_POLICY}"]
    return report("router", rows, notes)


def _bytes_per_node(num_nodes: int, num_workers: int) -> float:
    """Of an index in which every node is held by one worker, or (one in four chains) by two."""
    draw = random.Random(num_workers)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = NodeIndex(max_entries=4 * num_nodes)
        holders = [index.open(f"worker-{number}") for number in range(num_workers)]
        for holder in holders:
            index.show(holder)
        for number in range(-(-num_nodes // CHAIN_NODES)):
            keys = index.keys(draw.randbytes(CHAIN_NODES * ROUTING_NODE_BYTES))
            for holder in draw.sample(holders, min(num_workers, 1 + (number % 4 == 0))):
                index.store(holder, keys)
        return (tracemalloc.get_traced_memory()[0] - before) / index.num_nodes
    finally:
        tracemalloc.stop()


def _new_id() -> bytes:
    return secrets.token_bytes(16)


def _member(number: int) -> Worker:
    name = f"worker-{number}"
    hello = m.WorkerHello(worker_id=name, incarnation=1, major=wire.MAJOR, minor=wire.MINOR)
    return Worker(name.encode(), bytes(16), "tenant", hello, NOW, NOW, m.WorkerState.READY, NOW, is_known=True)
