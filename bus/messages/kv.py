"""The KV plane: tensors put, appended, read and forgotten, sequences pinned and listed, and bulk transfers."""

from __future__ import annotations

from typing import Annotated

import msgspec

from bus.messages.fields import U32, U63, Copies, Id16, Message, Millis, Name, Parts, SeqId
from bus.tensors import TensorMeta


class Put(Message, frozen=True):
    """Store K and V of one layer. Payloads: K and V, or none: then they follow as `Chunk`s.

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
