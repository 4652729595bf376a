"""Figures that travel: what a worker reports, what a broker answers, and why a request went where it did.

They are payloads rather than headers because they grow with the cluster. They are decoded with their
type like everything else; numbers are totals since the process started unless the name says otherwise.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec

from bus.errors import MalformedMessage
from bus.limits import MAX_COPIES, MAX_RECEIPTS
from bus.messages import U32, TokenLogprobs
from bus.wire import Buffer


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The root: plain data, encoded as a map so that a newer peer may add a field."""


class SaltStats(Figures, frozen=True):
    """What one tenant's requests of one salt looked up and found. `salt` names it without giving it away."""

    tenant: str
    salt: str
    lookup_tokens: int
    hit_tokens: int


class PoolStats(Figures, frozen=True):
    """One model's block pool and prefix cache.

    copied_tokens: of `hit_tokens`, those whose KV was copied out of a block that goes on otherwise. block_hits: times
    that a block served another sequence. blocks_by_hits: findable blocks now, by how often each has served: never,
    1, 2-3, 4-7, ... salts: those that looked up the most. audits_failed: found blocks that were not what the model
    computes; each is an alarm. sequence_evictions: named sequences forgotten for want of room.
    """

    num_blocks: int = 0
    free_blocks: int = 0
    held_blocks: int = 0
    cached_blocks: int = 0
    block_size: int = 0
    evictions: int = 0
    lookup_tokens: int = 0
    hit_tokens: int = 0
    preemptions: int = 0
    eviction_policy: str = ""
    copied_tokens: int = 0
    block_hits: int = 0
    blocks_by_hits: tuple[int, ...] = ()
    salts: tuple[SaltStats, ...] = ()
    audits_passed: int = 0
    audits_failed: int = 0
    audits_skipped: int = 0
    sequence_evictions: int = 0


class ModelStats(Figures, frozen=True):
    """A model that this worker may serve, and its state: absent, loading, ready or failed (with the reason).

    `stage` says in words what is being done to it, `progress` how much of that is done (0 to 1; 0 where it cannot be
    said). `loads` and `unloads` count; `weights_bytes` is what its weights are counted as while it is in memory.
    `runner` is what computes it, `torch` or `openvino`; `runner_reason` says why it is not the faster one.
    `attention` is how torch's attends to the pool, `gather` or `flex`, and `attention_reason` likewise.
    `kv_dtype` is how its pool keeps keys and values, `dtype` what it computes in. running, waiting: generations now.
    """

    name: str
    state: str
    reason: str = ""
    stage: str = ""
    progress: float = 0.0
    load_s: float = 0.0
    loads: int = 0
    unloads: int = 0
    weights_bytes: int = 0
    dtype: str = ""
    device: str = ""
    runner: str = ""
    runner_reason: str = ""
    attention: str = ""
    attention_reason: str = ""
    fingerprint: str = ""
    kv_dtype: str = ""
    num_layers: int = 0
    max_model_len: int = 0
    running: int = 0
    waiting: int = 0
    pool: PoolStats = PoolStats()


class StoreStats(Figures, frozen=True):
    """The explicit KV plane."""

    capacity_bytes: int = 0
    used_bytes: int = 0
    pinned_bytes: int = 0
    sequences: int = 0
    evictions: int = 0
    moved_bytes: int = 0
    puts: int = 0
    appends: int = 0
    gets: int = 0
    misses: int = 0


class EngineStats(Figures, frozen=True):
    """Generation. backlog_tokens: no total, but what is to be computed now until every request has a first token."""

    running: int = 0
    waiting: int = 0
    backlog_tokens: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    gaps_replayed: int = 0
    pulled_streams: int = 0


class PeerStats(Figures, frozen=True):
    """KV copied between workers.

    pulls: that came whole, `whole_tokens` in `pulled_s`; failures: the others, by the name of their error's code.
    pulled_tokens, pulled_bytes: that are in the pool, of both. bytes_per_s: of pulls that came whole, lately; links:
    the same by the worker they came from. served: copies of blocks that others took. sequences_given, sequences_taken:
    copies of whole named sequences, to others and from them.
    """

    pulls: int = 0
    failures: dict[str, int] = {}
    whole_tokens: int = 0
    pulled_tokens: int = 0
    pulled_bytes: int = 0
    pulled_s: float = 0.0
    bytes_per_s: int = 0
    links: dict[str, int] = {}
    served: int = 0
    served_bytes: int = 0
    sequences_given: int = 0
    sequences_taken: int = 0


class WorkerStats(Figures, frozen=True):
    """Everything one worker reports of itself."""

    worker_id: str
    incarnation: int
    state: str
    pid: int = 0
    uptime_s: float = 0.0
    rss_bytes: int = 0
    loop_lag_ms: float = 0.0
    malformed: int = 0
    models: tuple[ModelStats, ...] = ()
    engine: EngineStats = EngineStats()
    store: StoreStats = StoreStats()
    peers: PeerStats = PeerStats()


class WorkerView(Figures, frozen=True):
    """One worker as the broker sees it. `status`: ready, suspect, loading or draining.

    index: how well the broker knows what it holds (exact, degraded, blind). index_gaps: reports lost and asked for
    again. queue_s: prefill before it. prefill_tokens_per_s, pull_tokens_per_s (copied from peers): as learned, 0
    before it was. peer_url: where other workers copy from it.
    """

    worker_id: str
    status: str
    weight: int
    share: float
    inflight: int
    dispatched: int
    last_heard_s: float
    lease_s: float
    running: int = 0
    waiting: int = 0
    kv_used_bytes: int = 0
    kv_total_bytes: int = 0
    models: tuple[tuple[str, str], ...] = ()
    peer_url: str = ""
    index: str = ""
    indexed_nodes: int = 0
    index_gaps: int = 0
    queue_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    pull_tokens_per_s: float = 0.0
    stats: WorkerStats | None = None


class BrokerStats(Figures, frozen=True):
    """The broker's own figures. `failed` counts the ends it gave itself, by the name of their code.

    reasons: how often each policy decided for what reason, by the reason's first word.
    Of `prompt_tokens` that workers have prefilled, `foreseen_tokens` were in the index where they were sent, and
    `cached_tokens` were not computed.
    `sequences`: named ones of which it knows who holds them. `copied_sequences`: had another worker copy;
    `failed_copies`: by the name of the code of why not; not of what a generation left, which stays where it is when the
    ring changes. `waiting_copies`: to be made, or under way.
    `moved_sequences`: of those that were copied, to the worker that owns them since the ring has changed;
    `sequences_to_move`: that are still to be, when there is time. `warmed_prompts`: whose KV it had a worker fetch
    before that was asked for them; `prompts_to_warm`: still to be.
    `peer_messages_relayed`: between workers that cannot reach each other. version: of its program.
    """

    incarnation: int
    state: str
    policy: str
    version: str = ""
    uptime_s: float = 0.0
    pid: int = 0
    rss_bytes: int = 0
    loop_lag_ms: float = 0.0
    clients: int = 0
    streams: int = 0
    inflight: int = 0
    requests: int = 0
    failed: dict[str, int] = {}
    routed: dict[str, int] = {}
    reasons: dict[str, int] = {}
    pulls_ordered: int = 0
    malformed: int = 0
    unwelcome: int = 0
    peer_messages_relayed: int = 0
    refused_subscriptions: int = 0
    dropped_sends: int = 0
    queued_messages: int = 0
    tokens_relayed: int = 0
    workers_lost: int = 0
    indexed_nodes: int = 0
    prompt_tokens: int = 0
    foreseen_tokens: int = 0
    cached_tokens: int = 0
    sequences: int = 0
    copied_sequences: int = 0
    failed_copies: dict[str, int] = {}
    waiting_copies: int = 0
    warmed_prompts: int = 0
    prompts_to_warm: int = 0
    moved_sequences: int = 0
    sequences_to_move: int = 0


class ClusterStats(Figures, frozen=True):
    """The answer to a query: the broker, and the workers unless only health was asked."""

    healthy: bool
    broker: BrokerStats
    workers: tuple[WorkerView, ...] = ()


class Candidate(Figures, frozen=True):
    """One worker as a policy weighed it.

    index: how well it is known (exact, degraded, blind). hit_tokens: of the prompt, that it should hold. Estimates in
    seconds, `prefill_s` and `total_s` of policies that make any: waiting there, computing the rest, all together.
    """

    worker_id: str
    rank: int
    load: int
    weight: int
    limit: float = 0.0
    note: str = ""
    index: str = ""
    hit_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float | None = None
    total_s: float | None = None


class Explanation(Figures, frozen=True):
    """Why a request went where it did: the key, the policy, and every candidate in the order of preference.

    pull_from: the worker that the beginning of the prompt is copied from, if any.
    """

    policy: str
    key: str
    worker_id: str
    reason: str
    ring_epoch: str
    num_tokens: int = 0
    pull_from: str = ""
    candidates: tuple[Candidate, ...] = ()


class LayerInfo(Figures, frozen=True):
    layer: int
    length: int
    k_shape: tuple[int, ...]
    v_shape: tuple[int, ...]
    dtype: str


class SequenceInfo(Figures, frozen=True):
    """One sequence of a worker. `kind`: stored (put by a client) or computed (left by a generation).

    `version` grows with each write, whichever worker makes it: of two copies, the greater one is current.
    """

    seq_id: str
    kind: str
    nbytes: int
    pinned: bool
    layers: tuple[LayerInfo, ...]
    num_tokens: int = 0
    version: int = 0


class SequencePage(Figures, frozen=True):
    """Sequences in the order of their ids; `more` when the limit cut the list."""

    worker_id: str
    sequences: tuple[SequenceInfo, ...] = ()
    more: bool = False


class Holding(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A named sequence: its version, and whether the worker that tells of it has that or once had it.

    rf: how many workers are to have it.
    """

    tenant: Annotated[str, msgspec.Meta(max_length=256)]
    seq_id: Annotated[str, msgspec.Meta(max_length=256)]
    version: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    is_held: bool = True
    rf: Annotated[int, msgspec.Meta(ge=1, le=MAX_COPIES)] = 1


class Holdings(Figures, frozen=True):
    sequences: Annotated[tuple[Holding, ...], msgspec.Meta(max_length=1000)] = ()


class Receipt(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """A change to a sequence that took effect: whose request it was, under which id, a digest of what it asked for, and
    the `length` and `count` that it was answered with. Who asks it again gets that answer, and changes nothing."""

    client: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    req_id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    body: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    length: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    count: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Snapshot(Figures, frozen=True):
    """A sequence as it is copied: its layers, and the latest changes that made it what it is, oldest first."""

    info: SequenceInfo
    receipts: Annotated[tuple[Receipt, ...], msgspec.Meta(max_length=MAX_RECEIPTS)] = ()


class Spelling(Figures, frozen=True):
    """Texts of token ids: one for each, or one for all of them, special tokens spelled out."""

    texts: tuple[str, ...]


class PromptPart(Figures, frozen=True):
    """Some tokens of a prompt, one after the other; `logprobs` has one for each, None for the prompt's first."""

    token_ids: tuple[U32, ...]
    logprobs: tuple[TokenLogprobs | None, ...]


F = TypeVar("F", bound=Figures)


def pack(figures: Figures) -> bytes:
    """Encode for a payload frame. Of words that are no Unicode, such as an error with a file's name, the rest goes."""
    try:
        return msgspec.msgpack.encode(figures)
    except UnicodeEncodeError:
        return msgspec.msgpack.encode(_mended(msgspec.to_builtins(figures, builtin_types=(bytes,))))


def _mended(value: object) -> object:
    match value:
        case str():
            return value.encode(errors="replace").decode()
        case dict():
            return {_mended(key): _mended(it) for key, it in value.items()}
        case list() | tuple():
            return [_mended(it) for it in value]
        case _:
            return value


def unpack(data: Buffer, kind: type[F]) -> F:
    """Decode a payload frame as `kind`. Raises MalformedMessage."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise MalformedMessage(f"{kind.__name__} payload: {error}") from error
