"""What brokers and workers report of themselves, as metrics. Core.

Series are by worker and by model of a worker. There may be any number of either: the first `MAX_WORKERS` by name are
shown one by one and the others only counted, so that no cluster grows a page that nobody can scrape. What one process
counts since its start begins at zero again when it does, which is what Prometheus' `rate` expects of a counter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from bus.errors import ErrorCode
from bus.stats import BrokerStats, ClusterStats, ModelStats, WorkerStats, WorkerView
from kvcache.metrics.families import Family, Kind, by_label, capped

MAX_WORKERS = 256
MAX_MODELS = 16
MAX_REASONS = 64
DEVICE_TIER = "device"

WORKER_STATES = ("ready", "suspect", "loading", "draining")
INDEX_STATES = ("exact", "degraded", "blind")

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class _Figure(Generic[S]):
    """One number of a report, and the name that it goes by."""

    name: str
    kind: Kind
    text: str
    read: Callable[[S], float]


def _gauge(name: str, text: str, read: Callable[[S], float]) -> _Figure[S]:
    return _Figure(name, Kind.GAUGE, text, read)


def _count(name: str, text: str, read: Callable[[S], float]) -> _Figure[S]:
    return _Figure(name, Kind.COUNTER, text, read)


_BROKER: tuple[_Figure[BrokerStats], ...] = (
    _gauge("broker_uptime_seconds", "Since the broker started.", lambda it: it.uptime_s),
    _gauge("broker_resident_memory_bytes", "Resident memory of the broker.", lambda it: it.rss_bytes),
    _gauge("broker_loop_lag_seconds", "How late the broker's event loop was lately.", lambda it: it.loop_lag_ms / 1000),
    _gauge("broker_clients", "Clients that are connected.", lambda it: it.clients),
    _gauge("broker_streams", "Token streams that are open.", lambda it: it.streams),
    _gauge("broker_requests_in_flight", "Requests at workers.", lambda it: it.inflight),
    _gauge("broker_queued_messages", "Messages that peers have not taken yet.", lambda it: it.queued_messages),
    _gauge("broker_indexed_nodes", "Nodes of prompts that the broker knows to be held.", lambda it: it.indexed_nodes),
    _gauge("broker_sequences", "Named sequences of which it knows who holds them.", lambda it: it.sequences),
    _gauge("broker_waiting_copies", "Copies of sequences that are due or under way.", lambda it: it.waiting_copies),
    _gauge(
        "broker_sequences_to_move",
        "Sequences that another worker owns since the ring has changed.",
        lambda it: it.sequences_to_move,
    ),
    _count("broker_copied_sequences", "Sequences that a worker copied from another.", lambda it: it.copied_sequences),
    _count(
        "broker_moved_sequences", "Of them, to the worker that owns them since then.", lambda it: it.moved_sequences
    ),
    _gauge("broker_prompts_to_warm", "Prompts that new owners are still to fetch.", lambda it: it.prompts_to_warm),
    _count("broker_warmed_prompts", "Prompts that workers fetched before being asked.", lambda it: it.warmed_prompts),
    _count("broker_requests", "Requests that arrived.", lambda it: it.requests),
    _count("broker_dropped_messages", "Messages to peers that take none.", lambda it: it.dropped_sends),
    _count("broker_malformed_messages", "Messages that could not be read.", lambda it: it.malformed),
    _count("broker_unwelcome_messages", "Messages of peers that had not said hello.", lambda it: it.unwelcome),
    _count(
        "broker_refused_subscriptions",
        "Subscriptions to streams that are not open.",
        lambda it: it.refused_subscriptions,
    ),
    _count("broker_relayed_messages", "Messages with tokens, from workers to readers.", lambda it: it.tokens_relayed),
    _count(
        "broker_relayed_peer_messages",
        "Messages between workers that cannot reach each other.",
        lambda it: it.peer_messages_relayed,
    ),
    _count("broker_pulls_ordered", "Prefixes that workers were told to copy from others.", lambda it: it.pulls_ordered),
    _count("workers_lost", "Workers that died or fell silent.", lambda it: it.workers_lost),
    _count("routed_prompt_tokens", "Tokens of prompts that workers have prefilled.", lambda it: it.prompt_tokens),
    _count("routed_foreseen_tokens", "Of them, expected in the cache where they went.", lambda it: it.foreseen_tokens),
    _count("routed_cached_tokens", "Of them, found in the cache.", lambda it: it.cached_tokens),
)

_VIEW: tuple[_Figure[WorkerView], ...] = (
    _gauge("worker_weight", "Its part of the ring, relative to others.", lambda it: it.weight),
    _gauge("worker_ring_share", "Its part of the ring, 0 to 1.", lambda it: it.share),
    _gauge("worker_requests_in_flight", "Requests that the broker has there.", lambda it: it.inflight),
    _gauge("worker_silence_seconds", "Since the broker heard of it.", lambda it: it.last_heard_s),
    _gauge("worker_queue_seconds", "Prefill that waits there, as the broker estimates it.", lambda it: it.queue_s),
    _gauge("worker_prefill_tokens_per_second", "As learned; 0 before it was.", lambda it: it.prefill_tokens_per_s),
    _gauge("worker_pull_tokens_per_second", "Copied from peers, as learned.", lambda it: it.pull_tokens_per_s),
    _gauge("worker_kv_used_bytes", "KV memory in use, cached blocks included.", lambda it: it.kv_used_bytes),
    _gauge("worker_kv_total_bytes", "KV memory that it has.", lambda it: it.kv_total_bytes),
    _gauge("index_nodes", "Nodes that the broker knows it to hold.", lambda it: it.indexed_nodes),
    _count("index_gaps", "Reports of blocks that were lost and asked for again.", lambda it: it.index_gaps),
    _count("worker_requests", "Requests that were sent there.", lambda it: it.dispatched),
)

_WORKER: tuple[_Figure[WorkerStats], ...] = (
    _gauge("worker_uptime_seconds", "Since the worker started.", lambda it: it.uptime_s),
    _gauge("worker_resident_memory_bytes", "Resident memory of the worker.", lambda it: it.rss_bytes),
    _gauge(
        "worker_loop_lag_seconds", "How late its event loop was at its last tick.", lambda it: it.loop_lag_ms / 1000
    ),
    _gauge(
        "worker_backlog_tokens", "To be computed until every request has a token.", lambda it: it.engine.backlog_tokens
    ),
    _count("worker_malformed_messages", "Messages that could not be read.", lambda it: it.malformed),
    _count("engine_steps", "Forward passes.", lambda it: it.engine.steps),
    _count("engine_prompt_tokens", "Tokens of prompts that were admitted.", lambda it: it.engine.prompt_tokens),
    _count("engine_cached_tokens", "Of them, not computed.", lambda it: it.engine.cached_tokens),
    _count("engine_generation_tokens", "Tokens that were drawn.", lambda it: it.engine.completion_tokens),
    _count("engine_finished", "Generations that ended well.", lambda it: it.engine.finished),
    _count("engine_cancelled", "Generations that were given up.", lambda it: it.engine.cancelled),
    _count("engine_failed", "Generations that failed.", lambda it: it.engine.failed),
    _count(
        "stream_replays", "Gaps in streams that were filled on the reliable lane.", lambda it: it.engine.gaps_replayed
    ),
    _count(
        "streams_pulled", "Streams whose reader fell so far behind that it pulls.", lambda it: it.engine.pulled_streams
    ),
    _count("peer_pulls", "Prefixes copied whole from other workers.", lambda it: it.peers.pulls),
    _count("peer_pull_tokens", "Tokens whose KV came from other workers.", lambda it: it.peers.pulled_tokens),
    _count("peer_pull_bytes", "Bytes of it.", lambda it: it.peers.pulled_bytes),
    _count("peer_pull_seconds", "Spent on pulls that came whole.", lambda it: it.peers.pulled_s),
    _count("peer_served", "Copies that other workers took.", lambda it: it.peers.served),
    _count("peer_served_bytes", "Bytes of them.", lambda it: it.peers.served_bytes),
    _gauge("kv_plane_capacity_bytes", "Room for tensors that clients put.", lambda it: it.store.capacity_bytes),
    _gauge("kv_plane_used_bytes", "Of it, in use.", lambda it: it.store.used_bytes),
    _gauge("kv_plane_sequences", "Sequences that clients put.", lambda it: it.store.sequences),
    _count(
        "kv_plane_evictions",
        "Sequences of clients that were forgotten for want of room.",
        lambda it: it.store.evictions,
    ),
    _count("kv_plane_misses", "Reads of what is not there.", lambda it: it.store.misses),
)

_MODEL: tuple[_Figure[ModelStats], ...] = (
    _gauge("num_requests_running", "Generations that are computed.", lambda it: it.running),
    _gauge("num_requests_waiting", "Generations that wait to be.", lambda it: it.waiting),
    _gauge(
        "kv_cache_usage_perc",
        "Part of the blocks that sequences hold, 0 to 1; cached ones can be had at any time and do not count.",
        lambda it: it.pool.held_blocks / it.pool.num_blocks if it.pool.num_blocks else 0.0,
    ),
    _count("prefix_cache_queries", "Tokens that were looked up in the prefix cache.", lambda it: it.pool.lookup_tokens),
    _count("prefix_cache_hits", "Tokens that were found there.", lambda it: it.pool.hit_tokens),
    _count(
        "prefix_cache_copied_tokens",
        "Of them, copied out of blocks that go on otherwise.",
        lambda it: it.pool.copied_tokens,
    ),
    _count(
        "evicted_sequences",
        "Named sequences that were forgotten for want of room.",
        lambda it: it.pool.sequence_evictions,
    ),
    _count(
        "num_preemptions",
        "Generations that gave their blocks up and were computed again.",
        lambda it: it.pool.preemptions,
    ),
)

_CACHE_CONFIG: tuple[tuple[str, Callable[[ModelStats], str]], ...] = (
    ("block_size", lambda it: str(it.pool.block_size)),
    ("num_gpu_blocks", lambda it: str(it.pool.num_blocks)),
    ("cache_dtype", lambda it: it.kv_dtype),
    ("eviction_policy", lambda it: it.pool.eviction_policy),
    ("runner", lambda it: it.runner),
)


def cluster_families(stats: ClusterStats | None) -> list[Family]:
    """Everything that a broker has told; of one that does not answer, only that."""
    up = Family("up", Kind.GAUGE, "Whether the broker answered the last question.")
    up.add(stats is not None)
    if stats is None:
        return [up]
    shown = stats.workers[:MAX_WORKERS]
    workers = [(view.worker_id, view.stats) for view in shown if view.stats is not None]
    models = [(name, model) for name, worker in workers for model in _loaded(worker)]
    return [
        up,
        _alone("healthy", "Whether a worker can be routed to, and the broker takes requests.", stats.healthy),
        *_broker(stats.broker),
        *_members(stats.workers),
        *_table(_VIEW, ("worker",), [((view.worker_id,), view) for view in shown]),
        *_index(shown),
        *_table(_WORKER, ("worker",), [((name,), worker) for name, worker in workers]),
        _pull_failures(workers),
        _model_states(workers),
        *_table(_MODEL, ("worker", "model_name"), [((name, model.name), model) for name, model in models]),
        *_pools(models),
    ]


def _broker(broker: BrokerStats) -> Iterable[Family]:
    for figure in _BROKER:
        yield _alone(figure.name, figure.text, figure.read(broker), figure.kind)
    codes = Counter(dict.fromkeys((code.name for code in ErrorCode), 0))
    codes.update(broker.failed)
    refusals = Family("broker_refusals", Kind.COUNTER, "Requests that the broker ended itself, by why.", ("code",))
    yield by_label(refusals, capped(codes, MAX_REASONS).items())
    failed = Family("broker_failed_copies", Kind.COUNTER, "Copies of sequences that were not made, by why.", ("code",))
    yield by_label(failed, capped(broker.failed_copies, MAX_REASONS).items())
    decisions = Family("routing_decisions", Kind.COUNTER, "Requests placed, by policy and why.", ("policy", "reason"))
    for reason, count in capped(broker.reasons, MAX_REASONS).items():
        policy, _, why = reason.partition(": ")
        decisions.add(count, policy, why)
    yield decisions
    yield by_label(Family("broker_info", Kind.GAUGE, "The broker's policy.", ("policy",)), [(broker.policy, 1)])


def _members(workers: Sequence[WorkerView]) -> Iterable[Family]:
    counts = Counter(view.status for view in workers)
    members = Family("workers", Kind.GAUGE, "Workers, by what the broker thinks of them.", ("status",))
    yield by_label(members, [(state, counts[state]) for state in WORKER_STATES])
    yield _alone("workers_not_shown", "Workers without figures of their own here.", max(0, len(workers) - MAX_WORKERS))


def _index(workers: Sequence[WorkerView]) -> Iterable[Family]:
    states = Family("index_state", Kind.GAUGE, "1 for how well the broker knows what it holds.", ("worker", "state"))
    for view in workers:
        for state in INDEX_STATES:
            states.add(view.index == state, view.worker_id, state)
    yield states


def _pull_failures(workers: Sequence[tuple[str, WorkerStats]]) -> Family:
    failures = Family("peer_pull_failures", Kind.COUNTER, "Pulls that did not come whole, by why.", ("worker", "code"))
    for name, worker in workers:
        for code, count in capped(worker.peers.failures, MAX_REASONS).items():
            failures.add(count, name, code)
    return failures


def _model_states(workers: Sequence[tuple[str, WorkerStats]]) -> Family:
    states = Family("models", Kind.GAUGE, "Models that a worker may serve, by their state.", ("worker", "state"))
    for name, worker in workers:
        counts = Counter(model.state for model in worker.models)
        for state, count in sorted(counts.items()):
            states.add(count, name, state)
    return states


def _pools(models: Sequence[tuple[str, ModelStats]]) -> Iterable[Family]:
    """What is told of block pools by a third label."""
    at = ("worker", "model_name")
    blocks = Family("blocks", Kind.GAUGE, "Blocks of a pool, by where they are.", (*at, "state"))
    evictions = Family("evicted_blocks", Kind.COUNTER, "Cached blocks forgotten for want of room.", (*at, "tier"))
    audits = Family("audits", Kind.COUNTER, "Found blocks computed again; failed ones are alarms.", (*at, "result"))
    info = Family("cache_config_info", Kind.GAUGE, "How a pool is made.", (*at, *(name for name, _ in _CACHE_CONFIG)))
    for name, model in models:
        pool, place = model.pool, (name, model.name)
        for state, num in (("free", pool.free_blocks), ("held", pool.held_blocks), ("cached", pool.cached_blocks)):
            blocks.add(num, *place, state)
        evictions.add(pool.evictions, *place, DEVICE_TIER)
        for result, num in (("passed", pool.audits_passed), ("failed", pool.audits_failed)):
            audits.add(num, *place, result)
        info.add(1, *place, *(read(model) for _, read in _CACHE_CONFIG))
    return blocks, evictions, audits, info


def _table(
    figures: Sequence[_Figure[S]], labels: tuple[str, ...], rows: Sequence[tuple[tuple[str, ...], S]]
) -> Iterable[Family]:
    for figure in figures:
        yield Family(figure.name, figure.kind, figure.text, labels, [(at, figure.read(it)) for at, it in rows])


def _alone(name: str, text: str, value: float, kind: Kind = Kind.GAUGE) -> Family:
    return Family(name, kind, text, (), [((), value)])


def _loaded(worker: WorkerStats) -> list[ModelStats]:
    return [model for model in worker.models if model.pool.num_blocks][:MAX_MODELS]
