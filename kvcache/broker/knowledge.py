"""What the broker has learned of its workers: what they hold, how quick they are, and the work before them.

All of it is soft: a restart begins with nothing, and nothing here decides more than where a request is served. Work is
counted when it is dispatched, and leaves at its first token (`Prefilled`) or its end. Beliefs are made anew only for
workers of which something has changed since the last request, and for all of them at each tick.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import NamedTuple

from msgspec.structs import replace

from bus import messages as m
from bus.errors import ErrorCode
from bus.limits import MAX_CHAIN_NODES
from bus.stats import PeerStats, WorkerStats, WorkerView
from kvcache.broker.members import Call, Prefill, Worker, Workers
from kvcache.hashing import ROUTING_BLOCK_TOKENS, ROUTING_DEPTHS, ROUTING_TEXT_BLOCK_BYTES, TOKEN_BYTES
from kvcache.ring import HashRing
from kvcache.routing.feeds import Feed
from kvcache.routing.index import Keys, NodeIndex
from kvcache.routing.keys import RoutingKey
from kvcache.routing.ledger import WorkLedger
from kvcache.routing.links import LinkBook
from kvcache.routing.pending import PendingPrefixes
from kvcache.routing.rates import RateBook
from kvcache.routing.shares import Beginning, Shares
from kvcache.routing.views import Belief, Choice, Request

TEXT_BYTES_PER_TOKEN = 4.0
"""Of a text, before any worker has told how many tokens came of one; the usual figure for English."""
TEXT_MEMORY = 32
"""Texts after which one counts 1/e in what is known of bytes per token."""
SHARE_NODES = 8
"""Shares of traffic are counted for every 8th node: each 256 of the first 2,048 tokens, then twice as far apart."""
NOT_THE_LINK = {ErrorCode.NOT_FOUND.name, ErrorCode.OVERLOADED.name}
"""Failures of a pull that say nothing of the next: the holder had evicted it, there were too many at once."""


class Prompt(NamedTuple):
    """A prompt as far as a broker can tell. hits: its leading tokens that each worker holds or is computing; held: that
    it holds already, if others can copy from it. beginnings: those of which the share of the traffic is known.
    """

    keys: Keys
    num_tokens: int
    hits: dict[str, int]
    held: dict[str, int]
    beginnings: list[Beginning]


class HitCounts(NamedTuple):
    """Totals over prompts that were prefilled: what was foreseen to be cached where they went, and what was."""

    prompt_tokens: int = 0
    foreseen_tokens: int = 0
    cached_tokens: int = 0


class Knowledge:
    """`workers`: who is there, which is decided elsewhere."""

    def __init__(self, workers: Workers) -> None:
        self.index = NodeIndex()
        self.hits = HitCounts()
        self._workers = workers
        self._feeds: dict[str, Feed] = {}
        self._ledger = WorkLedger()
        self._rates = RateBook()
        self._links = LinkBook()
        self._pending = PendingPrefixes()
        self._shares = Shares()
        self._text_bytes_per_token = TEXT_BYTES_PER_TOKEN
        self._heard_at = 0.0  # of time: ends are dated with it, which is right to within a tick
        self._ring: HashRing | None = None
        self._beliefs: dict[str, Belief] = {}
        self._stale: set[str] = set()

    # --- what workers say of themselves ---

    def joined(self, worker: Worker, now: float) -> None:
        """A new session, in which it will tell what it holds."""
        self._feeds[worker.id] = Feed(self.index, worker.id, now)

    def parted(self, worker: Worker) -> None:
        """The worker is gone, and all that it held and was doing."""
        self._feeds.pop(worker.id).close()
        self._ledger.forget(worker.id)
        self._pending.forget(worker.id)
        self._rates.forget(worker.id)
        self._links.forget(worker.id)

    def reported(self, worker: Worker, message: m.NodesChanged | m.NodesHeld, nodes: bytes, now: float) -> None:
        """What a worker holds. Raises MalformedMessage."""
        feed = self._feeds[worker.id]
        if isinstance(message, m.NodesChanged):
            feed.changed(message, nodes, now)
        else:
            feed.held(message, nodes, now)
        self.touch(worker)

    def told(self, worker: Worker, beat: m.WorkerBeat, now: float) -> None:
        """A beat says up to where the worker has told its changes, and what waits there, whoever sent it."""
        self._feeds[worker.id].told(beat.changes, now)
        rates = self._rates.rates(worker.id)
        self._ledger.heard(worker.id, beat.backlog_tokens * rates.token_s if rates.is_learned else 0.0, now)
        self.touch(worker)

    def figures(self, worker: Worker, stats: WorkerStats, now: float) -> None:
        """Its figures, which count from its start: what they add to the last ones says how its pulls went."""
        before = worker.stats.peers if worker.stats is not None else PeerStats()
        after, worker.stats = stats.peers, stats
        if after.pulls > before.pulls:
            num_tokens, seconds = after.whole_tokens - before.whole_tokens, after.pulled_s - before.pulled_s
            self._links.measured(worker.id, num_tokens, seconds, now)
        elif any(
            num > before.failures.get(code, 0) for code, num in after.failures.items() if code not in NOT_THE_LINK
        ):
            self._links.failed(worker.id, now)
        self.touch(worker)

    def ask(self, worker: Worker, now: float) -> int | None:
        """The change after which this worker is to be asked for what is missing; None if nothing is, or not yet."""
        return self._feeds[worker.id].ask(now)

    # --- requests ---

    def read(self, tenant: str, message: m.Generate | m.Route) -> Prompt:
        """What is known of this prompt, now."""
        num_tokens, block_tokens = self._measure(message)
        keys = self.index.keys(b"".join(message.chain), tenant)
        whole = len(keys) if len(keys) < MAX_CHAIN_NODES else MAX_CHAIN_NODES + 1  # a chain that ends covers it all

        def covered(depth: int) -> int:
            return num_tokens if depth == whole else min(num_tokens, int(ROUTING_DEPTHS[depth - 1] * block_tokens))

        if isinstance(message, m.Generate) and message.sampling.prompt_logprobs is not None:
            return Prompt(keys, num_tokens, {}, {}, [])  # computed anew, wherever it goes
        hits = {worker: covered(depth) for worker, depth in self.index.held(keys).items()}
        held = {worker: hit for worker, hit in hits.items() if self._workers.by_id[worker].hello.peer_url}
        for worker, depth in self._pending.lookup(keys).items():
            hits[worker] = max(covered(depth), hits.get(worker, 0))
        depths = range(SHARE_NODES, len(keys) + 1, SHARE_NODES)
        return Prompt(keys, num_tokens, hits, held, [(keys[depth - 1], covered(depth)) for depth in depths])

    def dispatched(self, call: Call, message: m.Generate, prompt: Prompt, choice: Choice, now: float) -> None:
        """A generation went to its worker."""
        self._heard_at = now
        worker = call.worker
        estimate = next((it for it in choice.estimates if it.worker_id == worker.id), None)
        hit = prompt.hits.get(worker.id, 0)
        if choice.pull is not None:
            hit = max(hit, min(choice.pull.num_tokens, prompt.held.get(choice.pull.source, 0)))
        hit = min(hit, prompt.num_tokens - 1)
        if estimate is not None:
            seconds = estimate.prefill_s
        else:
            seconds = self._rates.rates(worker.id).prefill_s(prompt.num_tokens, hit, worker.decodes)
        is_text = message.kind is m.PromptKind.TEXT and len(message.payload) == 1
        call.prefill = Prefill(hit_tokens=hit, text_bytes=message.payload[0].nbytes if is_text else 0)
        self._rates.tried(worker.id, self._ledger.idle_s(worker.id, now))
        self._ledger.dispatched(call.id, worker.id, seconds, now)
        self._pending.dispatched(call.id, worker.id, prompt.keys)
        self._shares.arrived(prompt.beginnings, now)

    def pulls(self, call: Call) -> None:
        """The call's worker was told to fetch KV for it first."""
        self._links.ordered(call.id, call.worker.id)

    def prefilled(self, call: Call, report: m.Prefilled, now: float) -> None:
        """A call's first token is out. Said again, it is no news."""
        prefill, worker = call.prefill, call.worker
        if prefill is None or prefill.is_done or report.num_tokens == 0:
            return
        self._heard_at = now
        prefill.is_done = True
        self._leave(call, now)
        self._rates.prefilled(worker.id, report.num_tokens, report.num_cached, worker.decodes, report.compute_ms / 1000)
        worker.decodes += 1
        if call.is_own:
            return
        self.hits = HitCounts(
            self.hits.prompt_tokens + report.num_tokens,
            self.hits.foreseen_tokens + min(prefill.hit_tokens, report.num_tokens),
            self.hits.cached_tokens + min(report.num_cached, report.num_tokens),
        )
        if prefill.text_bytes:
            measured = prefill.text_bytes / report.num_tokens
            self._text_bytes_per_token += (measured - self._text_bytes_per_token) / TEXT_MEMORY

    def ended(self, call: Call) -> None:
        """A call is over, however it ended."""
        if call.prefill is not None:
            call.worker.decodes -= call.prefill.is_done
            self._leave(call, self._heard_at)
        self.touch(call.worker)

    def touch(self, worker: Worker) -> None:
        """Something about this worker has changed."""
        self._stale.add(worker.id)

    # --- what policies are shown ---

    def request(self, tenant: str, key: RoutingKey, prompt: Prompt, deadline_s: float, now: float) -> Request:
        """What is to be placed."""
        return Request(
            key,
            now,
            prompt.num_tokens,
            prompt.hits,
            prompt.held,
            deadline_s,
            self._ledger.delay_price(now, len(self._workers.ring)),
            tenant,
            self._shares.due_tokens(prompt.beginnings, prompt.hits, self.beliefs(now), now),
        )

    def beliefs(self, now: float) -> Mapping[str, Belief]:
        """Of each worker on the ring."""
        ring = self._workers.ring
        if ring is not self._ring:
            self._ring, self._beliefs = ring, {}
            self._stale.update(ring.workers)
        for name in self._stale:
            if name in ring.weights:
                self._beliefs[name] = self._believe(self._workers.by_id[name], now)
        self._stale.clear()
        return self._beliefs

    def tick(self, now: float) -> None:
        """Time has passed: whoever has fallen silent is believed in no longer, and the index is swept."""
        self._heard_at = now
        self._stale.update(self._workers.by_id)
        self.index.sweep()

    def view(self, view: WorkerView, now: float) -> WorkerView:
        """What is told of a worker, with what is known of it here."""
        feed, rates = self._feeds[view.worker_id], self._rates.rates(view.worker_id)
        pull_s = self._links.measured_s(view.worker_id)
        return replace(
            view,
            index=feed.state.value,
            indexed_nodes=feed.num_nodes,
            index_gaps=feed.num_gaps,
            queue_s=round(max(0.0, self._ledger.busy_until(view.worker_id) - now), 4),
            prefill_tokens_per_s=round(1 / rates.token_s, 1) if rates.is_learned and rates.token_s > 0 else 0.0,
            pull_tokens_per_s=round(1 / pull_s, 1),
        )

    def check(self) -> None:
        """Assert that what is known is of workers that are there, and that their decodes are their calls'."""
        self.index.check()
        assert self._feeds.keys() == self._workers.by_id.keys()
        for worker in self._workers.by_id.values():
            decoding = [call for call in worker.calls.values() if call.prefill is not None and call.prefill.is_done]
            assert worker.decodes == len(decoding), (worker.id, worker.decodes, len(decoding))
        if not any(worker.calls for worker in self._workers.by_id.values()):
            assert len(self._pending) == 0, "a prefix is pending that nobody computes"

    # --- inside ---

    def _believe(self, worker: Worker, now: float) -> Belief:
        rates = self._rates.rates(worker.id, self._ledger.idle_s(worker.id, now))
        # Before a prefill was timed nobody knows what a pull would save.
        pull_s = self._links.pull_s(worker.id, rates.token_s, now) if self._rates.is_learned else inf
        return Belief(
            inflight=len(worker.calls),
            weight=worker.hello.weight,
            turn=worker.turn,
            is_available=self._workers.is_available(worker, now),
            busy_until=self._ledger.busy_until(worker.id),
            behind_s=self._ledger.behind_s(worker.id),
            decodes=worker.decodes,
            index=self._feeds[worker.id].state,
            rates=replace(rates, pull_s=pull_s),
        )

    def _measure(self, message: m.Generate | m.Route) -> tuple[int, float]:
        """Tokens of the prompt, and tokens in a block of its chain; estimates, unless they came as tokens."""
        if isinstance(message, m.Route) or message.kind is m.PromptKind.TOKENS:
            if isinstance(message, m.Generate):
                return max(1, message.payload[0].nbytes // TOKEN_BYTES), ROUTING_BLOCK_TOKENS
            depth = ROUTING_DEPTHS[len(message.chain) - 1] if message.chain else 0
            return max(1, depth * ROUTING_BLOCK_TOKENS), ROUTING_BLOCK_TOKENS
        bytes_per_token = self._text_bytes_per_token
        return (
            max(1, int(message.payload[0].nbytes / bytes_per_token)),
            ROUTING_TEXT_BLOCK_BYTES / bytes_per_token,
        )

    def _leave(self, call: Call, now: float) -> None:
        self._ledger.finished(call.id, now)
        self._pending.finished(call.id)
        self._links.over(call.id)
        self.touch(call.worker)
