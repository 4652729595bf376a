"""From worker to worker: blocks that are pulled and sequences that are copied, and what the broker says of both."""

from __future__ import annotations

from typing import Annotated

import msgspec

from bus.messages.fields import U32, U63, Copies, Digest, Id16, Message, Millis, Name, Parts, SeqId


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
    `bus.stats.Snapshot`.
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
    """To a worker that drains: it need not wait for others to copy from it. num_left: sequences nobody else has now."""

    opcode = 87
    num_left: U63
