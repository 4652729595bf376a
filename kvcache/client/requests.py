"""From what a caller passed to a call under way: arguments are checked here, before anything is sent.

Every function takes the call's key and deadline first and raises BadArgument, BadTensor or TooLarge.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from bus import wire
from bus.errors import BadArgument, MalformedMessage
from bus.limits import MAX_COPIES, MAX_PROMPT_BYTES, MAX_SPELLED_TOKENS
from bus.messages import (
    Append,
    Delete,
    Detokenize,
    Detokenized,
    FlushPrefixCache,
    KvDone,
    KvListed,
    Length,
    ListSequences,
    Message,
    Pin,
    PromptKind,
    Put,
    Query,
    QueryKind,
    QueryReply,
    Route,
    Routed,
    Tokenize,
    Tokenized,
    Unpin,
)
from bus.stats import ClusterStats, Explanation, Figures, SequencePage, Spelling, unpack
from bus.tensors import MAX_TENSOR_BYTES
from bus.wire import Buffer
from kvcache.client.arrays import kv_tensors
from kvcache.client.calls import Read, UnaryCall
from kvcache.client.prompts import MAX_LAYER, MAX_LENGTH, check_index, check_name, check_seconds
from kvcache.client.results import Encoding
from kvcache.client.transfers import MakeWrite, ReadCall, WriteCall
from kvcache.hashing import TOKEN_BYTES, encode_token_ids

if TYPE_CHECKING:
    from kvcache.client.arrays import Array
    from kvcache.hashing import TokenIds

F = TypeVar("F", bound=Figures)


def query(key: bytes, deadline: float, kind: QueryKind) -> UnaryCall:
    """The broker's figures."""
    return UnaryCall(
        key, deadline, lambda req_id, **_: Query(req_id=req_id, kind=kind), _figures(QueryReply, ClusterStats)
    )


def route(key: bytes, deadline: float, *, seq_id: str, chain: tuple[bytes, ...], policy: str) -> UnaryCall:
    """Where a request with this key would go."""
    return UnaryCall(
        key,
        deadline,
        lambda req_id, **_: Route(req_id=req_id, seq_id=seq_id, chain=chain, policy=policy),
        _figures(Routed, Explanation),
    )


def tokenize(key: bytes, deadline: float, *, kind: PromptKind, payload: bytes, model: str, special: bool) -> UnaryCall:
    """Which tokens a prompt is."""
    make = partial(Tokenize, kind=kind, model=model, special=special, payload=wire.describe([payload]))
    return UnaryCall(key, deadline, make, _encoding, (payload,))


def detokenize(key: bytes, deadline: float, *, token_ids: TokenIds, model: str, each: bool) -> UnaryCall:
    """What token ids look like."""
    payload = encode_token_ids(token_ids)
    if not 0 < len(payload) <= MAX_PROMPT_BYTES:
        raise BadArgument(
            f"{len(payload) // TOKEN_BYTES} token ids; 1 to {MAX_SPELLED_TOKENS} can be asked for at once"
        )
    make = partial(Detokenize, model=model, each=each, payload=wire.describe([payload]))
    return UnaryCall(key, deadline, make, _figures(Detokenized, Spelling), (payload,))


def put(key: bytes, deadline: float, seq_id: str, layer: int, k: Array, v: Array, rf: int) -> WriteCall:
    return _write(Put, key, deadline, seq_id, layer, k, v, rf)


def append(
    key: bytes, deadline: float, seq_id: str, layer: int, k: Array, v: Array, at: int | None, rf: int
) -> WriteCall:
    offset = None if at is None else check_index("at", at, MAX_LENGTH)
    return _write(partial(Append, at=offset), key, deadline, seq_id, layer, k, v, rf)


def get(
    key: bytes, deadline: float, new_id: Callable[[], bytes], seq_id: str, layer: int, start: int, stop: int | None
) -> ReadCall:
    check_name("seq_id", seq_id)
    layer = check_index("layer", layer, MAX_LAYER)
    start = check_index("start", start, MAX_LENGTH)
    if stop is not None:
        stop = check_index("stop", stop, MAX_LENGTH)
        if stop < start:
            raise BadArgument(f"stop is {stop}, before start, {start}")
    return ReadCall(key, deadline, new_id, seq_id=seq_id, layer=layer, start=start, stop=stop)


def length(key: bytes, deadline: float, seq_id: str, layer: int) -> UnaryCall:
    check_name("seq_id", seq_id)
    layer = check_index("layer", layer, MAX_LAYER)
    return UnaryCall(key, deadline, partial(Length, seq_id=seq_id, layer=layer), _done("length"))


def delete(key: bytes, deadline: float, seq_id: str, layer: int | None) -> UnaryCall:
    check_name("seq_id", seq_id)
    which = None if layer is None else check_index("layer", layer, MAX_LAYER)
    return UnaryCall(key, deadline, partial(Delete, seq_id=seq_id, layer=which), _done("count"))


def pin(key: bytes, deadline: float, seq_id: str, ttl: float | None) -> UnaryCall:
    check_name("seq_id", seq_id)
    ttl_ms = 0 if ttl is None else max(1, round(1000 * check_seconds("ttl", ttl)))
    return UnaryCall(key, deadline, partial(Pin, seq_id=seq_id, ttl_ms=ttl_ms), _done("count"))


def unpin(key: bytes, deadline: float, seq_id: str) -> UnaryCall:
    check_name("seq_id", seq_id)
    return UnaryCall(key, deadline, partial(Unpin, seq_id=seq_id), _done("count"))


def page(key: bytes, deadline: float, *, worker_id: str, prefix: str, after: str, limit: int) -> UnaryCall:
    """One page of one worker's sequences."""
    make = partial(ListSequences, worker_id=worker_id, prefix=prefix, after=after, limit=limit)
    return UnaryCall(key, deadline, make, _figures(KvListed, SequencePage))


def flush(key: bytes, deadline: float, *, worker_id: str, cache_salt: str | None) -> UnaryCall:
    """One worker forgets prefixes."""
    return UnaryCall(
        key, deadline, partial(FlushPrefixCache, worker_id=worker_id, cache_salt=cache_salt), _done("count")
    )


def _write(
    kind: MakeWrite, key: bytes, deadline: float, seq_id: str, layer: int, k: Array, v: Array, rf: int
) -> WriteCall:
    check_name("seq_id", seq_id)
    layer = check_index("layer", layer, MAX_LAYER)
    rf = check_index("rf", rf, MAX_COPIES, least=1)
    pair = kv_tensors(k, v, MAX_TENSOR_BYTES)
    make = partial(kind, seq_id=seq_id, layer=layer, k=pair[0].meta, v=pair[1].meta, rf=rf)
    return WriteCall(key, deadline, pair, make)


def _encoding(message: Message, payload: Sequence[Buffer]) -> Encoding | None:
    if not isinstance(message, Tokenized):
        return None
    data = memoryview(payload[0])
    if len(data) % TOKEN_BYTES:
        raise MalformedMessage(f"token ids are {len(data)} bytes, not a whole number of u32")
    token_ids = tuple(token_id for (token_id,) in struct.iter_unpack("<I", data))
    return Encoding(token_ids=token_ids, model=message.model, max_model_len=message.max_model_len)


def _figures(answer: type[Message], kind: type[F]) -> Read:
    def read(message: Message, payload: Sequence[Buffer]) -> F | None:
        return unpack(memoryview(payload[0]), kind) if isinstance(message, answer) else None

    return read


def _done(field: str) -> Read:
    def read(message: Message, payload: Sequence[Buffer]) -> int | None:
        return getattr(message, field) if isinstance(message, KvDone) else None

    return read
