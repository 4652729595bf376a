"""Every message of the protocol, as frozen data, in one closed union per direction.

A message says what its sender means and nothing else: ids, numbers, text, tuples. Tensors, prompts
and other bulk travel beside it as payload frames, described by `payload`. The first field of every
request is `req_id`, so that even a request whose other fields are wrong can be answered. Ranges that
protect the process stand here, as types; ranges that a user can get wrong (a temperature, a length)
are checked where they are used, so that the answer can name the parameter.

docs/PROTOCOL.md holds the same as a table, and a test compares the two.
"""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

import msgspec

from bus.limits import MAX_CHAIN_NODES, MAX_CHANGED_NODES, MAX_COPIES
from bus.tensors import TensorMeta

MAX_PAYLOADS = 8
MAX_BEAT_MODELS = 32

U32 = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
U63 = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
I63 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
MAX_MILLIS = 7 * 24 * 3600 * 1000
Millis = Annotated[int, msgspec.Meta(ge=0, le=MAX_MILLIS)]
Id16 = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
ChainNode = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
Chain = Annotated[tuple[ChainNode, ...], msgspec.Meta(max_length=MAX_CHAIN_NODES)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
SeqId = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=1024)]
Piece = Annotated[str, msgspec.Meta(max_length=4096)]
Label = Annotated[str, msgspec.Meta(max_length=128, pattern=r"^[ -~]*\Z")]
TraceParent = Annotated[str, msgspec.Meta(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?\Z")]
Copies = Annotated[int, msgspec.Meta(ge=1, le=MAX_COPIES)]
PayloadBytes = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class Part(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One payload frame: its exact length and its crc32c."""

    nbytes: PayloadBytes
    crc: U32


Parts = Annotated[tuple[Part, ...], msgspec.Meta(max_length=MAX_PAYLOADS)]


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """The root. `opcode` picks the type before anything is parsed; `payloads` is how many frames may follow."""

    opcode: ClassVar[int] = 0
    payloads: ClassVar[tuple[int, int]] = (0, 0)


# --- joining and staying -------------------------------------------------------------------------


class WorkerState(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class ModelState(enum.StrEnum):
    ABSENT = "absent"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Hello(Message, frozen=True):
    """A client joins. `instance` is random per client object; it scopes request ids with the peer's user id."""

    opcode = 1
    instance: Id16
    major: U32
    minor: U32
    software: Name


class WorkerHello(Message, frozen=True):
    """A worker joins. Of two with one `worker_id`, the higher `incarnation` of the same user wins.

    peer_url: where other workers reach it to copy KV; empty if they cannot.
    sequences: how many named sequences it holds, of which it will tell.
    """

    opcode = 2
    worker_id: Name
    incarnation: U63
    major: U32
    minor: U32
    weight: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    state: WorkerState = WorkerState.READY
    pid: U63 = 0
    software: Name = ""
    peer_url: Name = ""
    sequences: U63 = 0


class Welcome(Message, frozen=True):
    """The broker accepts a peer. `session` is its secret for the bulk lane; limits hold for what it sends."""

    opcode = 3
    session: Id16
    incarnation: U63
    major: U32
    minor: U32
    heartbeat_ms: Millis
    lease_ms: Millis
    max_inline_bytes: U63
    max_prompt_bytes: U63
    max_tensor_bytes: U63
    chunk_bytes: U63
    window_tokens: U63


class AttachBulk(Message, frozen=True):
    """The first message on a bulk connection: whose it is."""

    opcode = 4
    session: Id16


class Beat(Message, frozen=True):
    """A client lives. The broker answers each with a `BrokerBeat`."""

    opcode = 5
    beat: U63


class WorkerBeat(Message, frozen=True):
    """A worker lives, and its engine moves: `progress` counts steps. Asks for its lease to be renewed.

    changes: the number of the last `NodesChanged` change that it has told this broker. backlog_tokens: to be computed
    there, whoever asked for them, before every request has its first token.
    """

    opcode = 6
    beat: U63
    state: WorkerState
    running: U32
    waiting: U32
    progress: U63
    kv_used_bytes: U63
    kv_total_bytes: U63
    models: Annotated[tuple[tuple[Name, ModelState], ...], msgspec.Meta(max_length=MAX_BEAT_MODELS)] = ()
    changes: U63 = 0
    backlog_tokens: U63 = 0


class BrokerBeat(Message, frozen=True):
    """Answers the beat of that number; the lease runs from when the beat was *sent*."""

    opcode = 7
    beat: U63
    lease_ms: Millis


class Goodbye(Message, frozen=True):
    """The sender leaves; nothing more comes from it."""

    opcode = 8
    reason: Text


class WorkerStatus(Message, frozen=True):
    """A worker's figures, pushed each second; the payload is a `bus.stats.WorkerStats`."""

    opcode = 9
    payloads = (1, 1)
    payload: Parts


# --- what a worker holds -------------------------------------------------------------------------


class NodeRun(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """So many of the payload's nodes belong to this tenant, and were stored (or else removed)."""

    tenant: Name
    is_stored: bool
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHANGED_NODES)]


NodeRuns = Annotated[tuple[NodeRun, ...], msgspec.Meta(max_length=128)]


class NodesChanged(Message, frozen=True):
    """Chain nodes whose blocks can be reused at this worker from now on, or no longer; for routing only.

    first: the first change's number; they are counted from 1 without gaps. Payload: 8 bytes a node, `runs` in order.
    """

    opcode = 10
    payloads = (1, 1)
    first: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    runs: NodeRuns
    payload: Parts


class NodesHeld(Message, frozen=True):
    """One part, from 0 on, of all nodes that a worker holds, as of the change numbered `after`; payload as above."""

    opcode = 11
    payloads = (1, 1)
    after: U63
    part: U32
    is_last: bool
    runs: NodeRuns
    payload: Parts


class AskNodes(Message, frozen=True):
    """The broker misses the changes after this one: tell them again or, if they are forgotten or `after` is 0, all
    that is held."""

    opcode = 12
    after: U63


# --- asking about the cluster --------------------------------------------------------------------


class QueryKind(enum.StrEnum):
    STATS = "stats"
    WORKERS = "workers"
    HEALTH = "health"


class Query(Message, frozen=True):
    """What is known of the cluster: all figures, workers as the broker sees them, or only whether it is healthy."""

    opcode = 16
    req_id: Id16
    kind: QueryKind


class Route(Message, frozen=True):
    """Which worker would serve this key now, and why; nothing is dispatched."""

    opcode = 17
    req_id: Id16
    seq_id: SeqId = ""
    chain: Chain = ()
    policy: Name = ""


class QueryReply(Message, frozen=True):
    """The answer to a `Query`; the payload is a `bus.stats.ClusterStats`."""

    opcode = 18
    payloads = (1, 1)
    req_id: Id16
    payload: Parts


class Routed(Message, frozen=True):
    """The answer to a `Route`, and sent with a `Generate(explain=True)`; payload: `bus.stats.Explanation`."""

    opcode = 19
    payloads = (1, 1)
    req_id: Id16
    worker_id: Name
    reason: Text
    payload: Parts


# --- generation ----------------------------------------------------------------------------------


class PromptKind(enum.StrEnum):
    TEXT = "text"
    TOKENS = "tokens"
    MESSAGES = "messages"


class Sampling(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How tokens are drawn and when to stop. Ranges are checked by `kvcache.sampling_checks.check_sampling`.

    logit_bias: (token id, what is added to its logit). logprobs: None for none, 0 for those of the tokens drawn, or
    how many of the likeliest to tell besides.
    """

    max_tokens: I63 = 128
    min_tokens: I63 = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: I63 = 0
    seed: I63 = 0
    stop: Annotated[tuple[Text, ...], msgspec.Meta(max_length=64)] = ()
    stop_token_ids: Annotated[tuple[I63, ...], msgspec.Meta(max_length=64)] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[tuple[tuple[I63, float], ...], msgspec.Meta(max_length=512)] = ()
    logprobs: I63 | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """Natural logarithms of one token's probability and, as (token id, logarithm), of the likeliest tokens' there."""

    logprob: float
    top: Annotated[tuple[tuple[U32, float], ...], msgspec.Meta(max_length=32)] = ()


class OpenStream(Message, frozen=True):
    """Ask for a topic that nobody can guess. Subscribe, wait for `SubAck`, then `Generate`."""

    opcode = 32
    req_id: Id16


class StreamOpened(Message, frozen=True):
    """The stream is open, for one `Generate`, which must come within a minute."""

    opcode = 33
    req_id: Id16
    stream_id: Id16


class Generate(Message, frozen=True):
    """Generate from a prompt. Payloads: the prompt (utf-8 text, `<u4` token ids, or JSON: a list
    of messages, or an object of messages and tools), and, when the stream goes on after a fault, the `<u4` tokens that
    the client already has; `epoch` is then higher. Of two that wait the one of lower `priority` is sooner.

    pull_from: a worker to copy the prompt's leading KV from, if it lives, whatever the policy thinks; empty: none.
    label: what logs call this request, printable ASCII; empty: its id in hex. trace: W3C's traceparent of who asks.
    """

    opcode = 34
    payloads = (1, 2)
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    stream_id: Id16
    epoch: U32
    kind: PromptKind
    sampling: Sampling
    model: Name = ""
    seq_id: SeqId = ""
    cache_salt: Name = ""
    policy: Name = ""
    chain: Chain = ()
    explain: bool = False
    pull_from: Name = ""
    payload: Parts = ()
    priority: I63 = 0
    label: Label = ""
    trace: TraceParent = ""


class Cancel(Message, frozen=True):
    """Stop this request; it ends in `Failed(CANCELLED)` unless it has ended already."""

    opcode = 35
    req_id: Id16


class Resume(Message, frozen=True):
    """Tokens are missing from `from_seq` on: replay them on the reliable lane."""

    opcode = 36
    req_id: Id16
    epoch: U32
    from_seq: U63


class Ack(Message, frozen=True):
    """All tokens below `upto` have arrived; the worker may run ahead of it by the window."""

    opcode = 37
    req_id: Id16
    epoch: U32
    upto: U63


class Started(Message, frozen=True):
    """The worker admitted the sequence: where it runs, why there, and how much of the prompt was cached."""

    opcode = 38
    req_id: Id16
    epoch: U32
    worker_id: Name
    reason: Text
    model: Name
    prompt_tokens: U63
    cached_tokens: U63


class Replay(Message, frozen=True):
    """Tokens from `seq` on, on the reliable lane. `pull`: publishing has stopped, ask again with `Resume`.

    logprobs: one per token if they were asked for, else none."""

    opcode = 39
    req_id: Id16
    epoch: U32
    seq: U63
    tokens: Annotated[tuple[U32, ...], msgspec.Meta(max_length=256)]
    texts: Annotated[tuple[Piece, ...], msgspec.Meta(max_length=256)]
    pull: bool = False
    logprobs: Annotated[tuple[TokenLogprobs, ...], msgspec.Meta(max_length=256)] = ()


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"


class StreamEnd(Message, frozen=True):
    """The one good end of a `Generate`: how many tokens there are, and blake2b-256 over all of them as `<u4`."""

    opcode = 40
    req_id: Id16
    epoch: U32
    num_tokens: U63
    digest: Digest
    finish_reason: FinishReason
    prompt_tokens: U63
    cached_tokens: U63
    queue_ms: float
    prefill_ms: float
    decode_ms: float


class Tokenize(Message, frozen=True):
    """Which tokens a prompt is. Payload: as a `Generate`'s; `special`: with the special tokens a text begins with."""

    opcode = 41
    payloads = (1, 1)
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    kind: PromptKind
    model: Name = ""
    special: bool = True
    payload: Parts = ()


class Tokenized(Message, frozen=True):
    """The answer to a `Tokenize`; the payload is the token ids, `<u4`."""

    opcode = 42
    payloads = (1, 1)
    req_id: Id16
    model: Name
    max_model_len: U63
    payload: Parts


class Detokenize(Message, frozen=True):
    """What tokens look like. Payload: `<u4` token ids. `each`: one text for each of them, else one for all."""

    opcode = 43
    payloads = (1, 1)
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    model: Name = ""
    each: bool = False
    payload: Parts = ()


class Detokenized(Message, frozen=True):
    """The answer to a `Detokenize`; the payload is a `bus.stats.Spelling`."""

    opcode = 44
    payloads = (1, 1)
    req_id: Id16
    payload: Parts


# --- the stream itself (PUB/SUB; the topic says which) -------------------------------------------


class SubAck(Message, frozen=True):
    """The broker lets this subscription see its stream; sent on the topic."""

    opcode = 48


class StreamTokens(Message, frozen=True):
    """Tokens `seq ..` of one stream, each with the text it released (which may be empty).

    logprobs: one per token if they were asked for, else none."""

    opcode = 49
    epoch: U32
    seq: U63
    tokens: Annotated[tuple[U32, ...], msgspec.Meta(max_length=64)]
    texts: Annotated[tuple[Piece, ...], msgspec.Meta(max_length=64)]
    logprobs: Annotated[tuple[TokenLogprobs, ...], msgspec.Meta(max_length=64)] = ()


class StreamBeat(Message, frozen=True):
    """How far the stream has got; shows the loss of the last message."""

    opcode = 50
    epoch: U32
    next_seq: U63


# --- the KV plane --------------------------------------------------------------------------------


class Put(Message, frozen=True):
    """Store K and V of one layer. Payloads: K and V, or none: then they follow as `Chunk`s once there is `Credit`.

    rf: how many workers are to have it before it is acknowledged.
    """

    opcode = 64
    payloads = (0, 2)
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    seq_id: SeqId
    layer: U32
    k: TensorMeta
    v: TensorMeta
    payload: Parts = ()
    rf: Copies = 1


class Append(Message, frozen=True):
    """Add to the end of a layer, if its length is `at` (or whatever it is, when `at` is None). rf: as of `Put`."""

    opcode = 65
    payloads = (0, 2)
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    seq_id: SeqId
    layer: U32
    k: TensorMeta
    v: TensorMeta
    at: U63 | None = None
    payload: Parts = ()
    rf: Copies = 1


class Get(Message, frozen=True):
    """Read tokens `start .. stop` of one layer (`stop` None: to the end). `credit`: chunks the client can take now."""

    opcode = 66
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    seq_id: SeqId
    layer: U32
    start: U63 = 0
    stop: U63 | None = None
    credit: U32 = 8


class Length(Message, frozen=True):
    """How many tokens one layer of a sequence holds."""

    opcode = 67
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    seq_id: SeqId
    layer: U32


class Delete(Message, frozen=True):
    """Forget a sequence, or one layer of it. Every ready worker gets it; one answer comes back."""

    opcode = 68
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    seq_id: SeqId
    layer: U32 | None = None


class Pin(Message, frozen=True):
    """Keep a sequence from eviction, for `ttl_ms` or (0) until it is unpinned."""

    opcode = 69
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    seq_id: SeqId
    ttl_ms: Millis = 0


class Unpin(Message, frozen=True):
    """Let a sequence be evicted again."""

    opcode = 70
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    seq_id: SeqId


class ListSequences(Message, frozen=True):
    """Sequences of one worker, in the order of their ids, after `after`. The client asks each worker in turn."""

    opcode = 71
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    worker_id: Name
    prefix: SeqId = ""
    after: SeqId = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1000


class KvDone(Message, frozen=True):
    """A KV request took effect. `durability` says where an acknowledged write is: `mem1`, one memory, or `mem2`, two.

    length: tokens now in the layer. count: layers, sequences or blocks concerned. duplicate: it was applied before.
    """

    opcode = 72
    req_id: Id16
    length: U63 = 0
    count: U63 = 0
    durability: Name = "mem1"
    duplicate: bool = False


class KvValue(Message, frozen=True):
    """What a `Get` found. Payloads: K and V; none: they follow as `Chunk`s."""

    opcode = 73
    payloads = (0, 2)
    req_id: Id16
    k: TensorMeta
    v: TensorMeta
    length: U63
    payload: Parts = ()


class KvListed(Message, frozen=True):
    """One page of `ListSequences`; the payload is a `bus.stats.SequencePage`."""

    opcode = 74
    payloads = (1, 1)
    req_id: Id16
    payload: Parts


class Credit(Message, frozen=True):
    """The receiver of a bulk transfer can take this many more chunks."""

    opcode = 75
    req_id: Id16
    chunks: U32


class Chunk(Message, frozen=True):
    """Bytes `offset ..` of a transfer: K's bytes, then V's; a chunk never holds some of both."""

    opcode = 76
    payloads = (1, 1)
    req_id: Id16
    offset: U63
    payload: Parts


class FlushPrefixCache(Message, frozen=True):
    """Forget the prefixes on one worker that the sender's tenant may share; `cache_salt`: only those of this salt.

    The client asks each worker in turn. Answered with a `KvDone` that counts blocks.
    """

    opcode = 77
    req_id: Id16
    attempt: U32
    deadline_ms: Millis
    worker_id: Name
    cache_salt: Name | None = None


# --- from worker to worker ----------------------------------------------------------------------


class PullOrder(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Copy the KV of at most `num_tokens` leading tokens from this worker; compute it if that fails or takes longer
    than `budget_ms`. The worker also keeps half of what remains of the deadline for computing."""

    worker_id: Name
    url: Name
    ticket: Id16
    num_tokens: U63
    budget_ms: Millis


class Grant(Message, frozen=True):
    """Broker to a holder of KV: whoever shows this ticket is `target` and may copy once, within `ttl_ms`.

    Of this tenant's blocks, at most those of the first `num_tokens` tokens of a prompt; or this tenant's sequence
    `seq_id` and nothing else, if it is not empty.
    """

    opcode = 80
    ticket: Id16
    target: Name
    tenant: Name
    num_tokens: U63
    ttl_ms: Millis
    seq_id: SeqId = ""


class PullBlocks(Message, frozen=True):
    """Copy me the blocks of these tokens from block `start` on, as far as you have them. Payload: `<u4` token ids.

    digest: of the last block, by all that names blocks (`kvcache.hashing.HashSeed`), so that both ends mean the
    same. credit: chunks that may come at once.
    """

    opcode = 81
    payloads = (1, 1)
    req_id: Id16
    ticket: Id16
    worker_id: Name
    fingerprint: Name
    dtype: Name
    layout_version: U32
    block_size: Annotated[int, msgspec.Meta(ge=1, le=2**16)]
    cache_salt: Name
    start: U32
    digest: Digest
    credit: U32
    payload: Parts


class BlocksFound(Message, frozen=True):
    """The leading run that is there ends before block `num_blocks`, whose last digest is `digest`; chunks follow.

    A block is `block_bytes` long: `[num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]`, C order.
    """

    opcode = 82
    req_id: Id16
    num_blocks: U32
    digest: Digest
    block_bytes: U63


# --- sequences that are copied ---------------------------------------------------------------------


class CopySequence(Message, frozen=True):
    """Broker to a worker: have this sequence too, by copying it from that worker, in this version or a later one.

    ticket: what the holder was told of by a `Grant`; it also names the copy in `SequenceCopied`.
    """

    opcode = 83
    ticket: Id16
    worker_id: Name
    url: Name
    tenant: Name
    seq_id: SeqId
    version: U63
    budget_ms: Millis


class PullSequence(Message, frozen=True):
    """Copy me the sequence that this ticket is for. credit: chunks that may come at once."""

    opcode = 84
    req_id: Id16
    ticket: Id16
    worker_id: Name
    credit: U32


class SequenceFound(Message, frozen=True):
    """The sequence as it is now; chunks follow: layer by layer in the order told, of each K's bytes, then V's.

    version: that which the copy will be. rf: how many workers are to have it. copies: how many may have this version,
    this copy included. pin_ms: how long it stays pinned, if it is; 0: until it is unpinned. Payload:
    `bus.stats.SequenceInfo`.
    """

    opcode = 85
    payloads = (1, 1)
    req_id: Id16
    version: U63
    rf: Copies
    copies: U32
    pin_ms: Millis
    payload: Parts


class SequenceCopied(Message, frozen=True):
    """What became of a `CopySequence`: it is here in this version, or (`code` not 0) why it is not."""

    opcode = 86
    ticket: Id16
    version: U63 = 0
    code: U32 = 0


class HandedOver(Message, frozen=True):
    """To a worker that drains: nothing more is to be copied from it. num_left: sequences that nobody else has now."""

    opcode = 87
    num_left: U63


# --- where named sequences are --------------------------------------------------------------------


class WorkerSequences(Message, frozen=True):
    """What has become of a worker's named sequences; the payload is a `bus.stats.Holdings`.

    A worker tells all that it has when it joins, then what changes. is_complete: nothing is left to tell now.
    """

    opcode = 88
    payloads = (1, 1)
    is_complete: bool
    payload: Parts


class DropSequences(Message, frozen=True):
    """Newer copies than these exist: drop what is older. The payload is a `bus.stats.Holdings`."""

    opcode = 89
    payloads = (1, 1)
    payload: Parts


# --- ends and envelopes --------------------------------------------------------------------------


class Failed(Message, frozen=True):
    """The one bad end of any request. `req_id` is all zero when the request could not be read that far."""

    opcode = 96
    req_id: Id16
    code: U32
    message: Text
    retryable: bool
    retry_after_ms: Millis = 0
    detail: I63 = 0


class Assign(Message, frozen=True):
    """Envelope, broker to worker: a request begins. The client's own frames follow untouched.

    call: the broker's number for it. tenant, client: who asks, by the broker's word. reason: why this worker.
    pull: where to copy the KV of the prompt's beginning from, if that pays.
    newest: the newest version of the sequence that the broker has heard of; an older copy must not answer.
    version: what a write makes it. copies: how many workers are given this write.
    trace: the broker's own span, if it records one; else that of the request counts.
    """

    opcode = 112
    call: U63
    tenant: Name
    client: Id16
    deadline_ms: Millis
    reason: Text
    pull: PullOrder | None = None
    newest: U63 = 0
    version: U63 = 0
    copies: Copies = 1
    trace: TraceParent = ""


class Forward(Message, frozen=True):
    """Envelope, broker to worker: more of a request that was assigned (a cancel, an ack, a chunk)."""

    opcode = 113
    call: U63


class Reply(Message, frozen=True):
    """Envelope, worker to broker: an answer within a call; `final` ends it. The answer's frames follow untouched.

    version: that of the sequence, if this answers a write that took effect.
    """

    opcode = 114
    call: U63
    final: bool
    version: U63 = 0


class Release(Message, frozen=True):
    """Broker to worker: nobody waits for this call any more; stop its work. No answer is expected."""

    opcode = 115
    call: U63


class Prefilled(Message, frozen=True):
    """Worker to broker: this call's first token is out. How much was computed for it, and in what time.

    num_cached of its num_tokens were there. compute_ms: its part of the steps it was in, by tokens.
    """

    opcode = 116
    call: U63
    num_tokens: U63
    num_cached: U63
    compute_ms: Annotated[float, msgspec.Meta(ge=0, le=MAX_MILLIS)]


Dispatched = (
    Generate
    | Tokenize
    | Detokenize
    | Put
    | Append
    | Get
    | Length
    | Delete
    | Pin
    | Unpin
    | ListSequences
    | FlushPrefixCache
)
"""Requests that the broker hands to a worker."""

FollowUp = Cancel | Resume | Ack | Credit | Chunk
"""What a client says within a request that was dispatched."""

ToBroker = Hello | AttachBulk | Beat | Goodbye | OpenStream | Query | Route | Dispatched | FollowUp
WorkerToBroker = (
    WorkerHello
    | AttachBulk
    | WorkerBeat
    | WorkerStatus
    | NodesChanged
    | NodesHeld
    | WorkerSequences
    | SequenceCopied
    | Goodbye
    | Reply
    | Prefilled
)
ToWorker = (
    Welcome
    | BrokerBeat
    | AskNodes
    | Goodbye
    | DropSequences
    | CopySequence
    | HandedOver
    | Assign
    | Forward
    | Release
    | Grant
    | Failed
)
ToHolder = PullBlocks | PullSequence | Credit | Cancel
"""What a worker hears from another that copies from it."""

ToPuller = BlocksFound | SequenceFound | Chunk | Failed
"""What a worker hears from another that it copies from."""

ToClient = (
    Welcome
    | BrokerBeat
    | Goodbye
    | QueryReply
    | Routed
    | StreamOpened
    | Started
    | Replay
    | StreamEnd
    | Tokenized
    | Detokenized
    | KvDone
    | KvValue
    | KvListed
    | Credit
    | Chunk
    | Failed
)
OnStream = SubAck | StreamTokens | StreamBeat
