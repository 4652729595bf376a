"""The explicit KV plane: keys and values that clients put, append and get, per sequence and layer, bit for bit.

One preallocated region, cut into pages; K and V of a layer are two byte runs over pages that need not be
neighbours. A write is begun (its room is taken, all or nothing), filled in pieces, and committed; until then the
value before it is what is read. An append goes behind the end in place: no stored byte is ever moved again.

Room is made by evicting whole sequences, least recently used first; never one that is pinned, or being read or
written. A value that is replaced or deleted while it is being read keeps its pages until the last reader is done.

The caller sees to it that every transfer is committed or aborted, by its deadline, and every read closed.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from bus.errors import BadArgument, NoSpace, NotFound
from bus.stats import SequenceInfo, StoreStats
from bus.tensors import TensorMeta, check_kv_pair
from workers.keys import SequenceKey
from workers.kv_sequences import KVSequences
from workers.memory import HostMemory
from workers.transfers import Kind, Layer, Transfer, place_of_append, row_bytes

PAGE_BYTES = 65536

Buffer: TypeAlias = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Committed:
    """A write took effect. length: tokens of the layer now. duplicate: an append that had been applied before."""

    length: int
    duplicate: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """A range of a layer, held until `close_read`; `chunks` yields its bytes.

    k, v: dtype and shape `[stop - start, num_kv_heads, head_dim]`. length: tokens of the whole layer.
    """

    key: SequenceKey
    layer: Layer
    start: int
    k: TensorMeta
    v: TensorMeta
    length: int


class KVStore:
    """Keys and values in `memory`, in pages of `page_bytes`. Raises ValueError if not even one page fits."""

    def __init__(self, memory: HostMemory, page_bytes: int = PAGE_BYTES) -> None:
        if not 0 < page_bytes <= memory.nbytes:
            raise ValueError(f"pages of {page_bytes} bytes cannot be cut from {memory.nbytes} bytes")
        self._memory = memory
        self._sequences = KVSequences(memory.nbytes // page_bytes, page_bytes)
        self._totals: Counter[str] = Counter()  # by the names of StoreStats

    # --- writing ---

    def begin_put(
        self, key: SequenceKey, layer: int, k: TensorMeta, v: TensorMeta, *, now: float, may_evict: bool = True
    ) -> Transfer:
        """Take room for a new value of a layer, which replaces the old one when it is committed.

        k, v: `[seq_len, num_kv_heads, head_dim]`, of one dtype; only their head_dim may differ.
        Raises BadTensor for other shapes, BadArgument for an empty name or a layer that is no u32, NoSpace if there
        is no room for it, or none without evicting if nothing may be evicted.
        """
        _check_target(key, layer)
        check_kv_pair(k, v)
        transfer = Transfer(Kind.PUT, key, layer, self._sequences.new_layer(k, v), 0, k.shape[0])
        return self._begin(transfer, now, may_evict=may_evict)

    def begin_append(
        self,
        key: SequenceKey,
        layer: int,
        k: TensorMeta,
        v: TensorMeta,
        at: int | None,
        *,
        now: float,
    ) -> Transfer:
        """Take room for tokens behind the end of a layer, if its length is `at` (None: whatever it is).

        A layer that does not exist has length 0, and its first append makes it. When all of `at .. at + seq_len`
        is there already, the pieces are compared with it instead, and the commit says whether they were the same:
        so an append whose answer was lost can be sent again.
        Raises Conflict, with the current length, for any other `at` or while another append is under way; NotFound
        for `at` > 0 on a layer that does not exist; BadTensor if dtype, heads or head_dim are not the layer's; and
        as `begin_put` does.
        """
        _check_target(key, layer)
        check_kv_pair(k, v)
        existing = self._sequences.find(key, layer)
        if existing is None:
            if at:
                self._sequences.layer(key, layer)  # raises NotFound
            target, start, kind = self._sequences.new_layer(k, v), 0, Kind.APPEND
        else:
            target, (start, kind) = existing, place_of_append(existing, k, v, at)
        transfer = Transfer(kind, key, layer, target, start, k.shape[0])
        return self._begin(transfer, now)

    def write(self, transfer: Transfer, offset: int, data: Buffer) -> None:
        """Fill in bytes `offset ..` of a transfer: K's bytes first, then V's. Each byte once, in any order.

        Raises BadTensor for bytes outside, sent twice, or of both K and V in one piece.
        """
        assert transfer.is_open, "the transfer has ended"
        piece = memoryview(data).cast("B")
        run, position = transfer.target(offset, len(piece))
        transfer.coverage.add(offset, offset + len(piece))
        done = 0
        for where, nbytes in run.locate(position, len(piece)):
            part = piece[done : done + nbytes]
            if transfer.kind is Kind.VERIFY:
                transfer.differs = transfer.differs or self._memory.read(where, nbytes) != part
            else:
                self._memory.write(where, part)
                self._totals["moved_bytes"] += nbytes
            done += nbytes

    def commit(self, transfer: Transfer) -> Committed:
        """Make a complete transfer visible, at once and whole. The transfer ends, whatever comes of it.

        Raises BadTensor if bytes are missing, and Conflict, with the current length, if the layer was replaced or
        deleted during the append, or if the bytes differ from those that are there already.
        """
        assert transfer.is_open, "the transfer has ended"
        current = self._sequences.find(transfer.key, transfer.layer_number)
        error = transfer.refusal(current)
        if error is not None:
            self._end(transfer)
            raise error
        layer = transfer.layer
        if transfer.kind is not Kind.VERIFY:
            layer.length = transfer.start + transfer.num_tokens
            self._totals["puts" if transfer.kind is Kind.PUT else "appends"] += 1
            if layer is not current:
                self._sequences.place(transfer.key, transfer.layer_number, layer)
        self._end(transfer)
        return Committed(layer.length, duplicate=transfer.kind is Kind.VERIFY)

    def abort(self, transfer: Transfer) -> None:
        """End a transfer without effect; its room is free again."""
        assert transfer.is_open, "the transfer has ended"
        self._end(transfer)

    # --- reading ---

    def open_read(self, key: SequenceKey, layer: int, start: int = 0, stop: int | None = None) -> Read:
        """Hold tokens `start .. stop` of a layer (None: to its end) as they are now, until `close_read`.

        Raises NotFound, or BadArgument for a range that the layer does not have.
        """
        self._totals["gets"] += 1
        try:
            found = self._sequences.layer(key, layer)
        except NotFound:
            self._totals["misses"] += 1
            raise
        end = found.length if stop is None else stop
        if not 0 <= start <= end <= found.length:
            raise BadArgument(f"tokens {start} to {end} were asked for, layer {layer} has 0 to {found.length}")
        self._sequences.hold(key, found)
        return Read(key, found, start, _shaped(found.k, end - start), _shaped(found.v, end - start), found.length)

    def chunks(self, read: Read, max_bytes: int) -> Iterator[tuple[int, memoryview]]:
        """The bytes of K, then of V, as (offset, read-only window on the region), at most `max_bytes` each.

        Windows are valid until `close_read`. Nothing is copied: a window ends where neighbouring pages end, and
        where K ends, so it may be shorter. Offsets count from the start of K through the end of V.
        """
        base = 0
        for meta, run in ((read.k, read.layer.k_run), (read.v, read.layer.v_run)):
            done = 0
            for where, nbytes in run.locate(read.start * row_bytes(meta), meta.nbytes):
                for begin in range(0, nbytes, max_bytes):
                    size = min(max_bytes, nbytes - begin)
                    yield base + done + begin, self._memory.read(where + begin, size)
                done += nbytes
            base += meta.nbytes

    def close_read(self, read: Read) -> None:
        """Let go of what was read; its windows must not be used any more."""
        self._sequences.let_go(read.key, read.layer)

    def length(self, key: SequenceKey, layer: int) -> int:
        """Tokens of a layer. Raises NotFound."""
        return self._sequences.layer(key, layer).length

    # --- sequences ---

    def describe(self, key: SequenceKey, now: float) -> SequenceInfo:
        """What is stored of a sequence; its version is not known here. Raises NotFound."""
        return self._sequences.describe(key, now)

    def pinned_s(self, key: SequenceKey, now: float) -> float | None:
        """For how long it is still pinned, which may be for ever; None if it is not. Raises NotFound."""
        until = self._sequences.sequence(key).pinned_until
        return until - now if until > now else None

    def has(self, key: SequenceKey) -> bool:
        """Whether any layer of it is stored."""
        return self._sequences.has(key)

    def take_evicted(self) -> list[SequenceKey]:
        """The sequences that had to make room since the last call."""
        evicted, self._sequences.evicted = self._sequences.evicted, []
        return evicted

    def delete(self, key: SequenceKey, layer: int | None = None) -> int:
        """Forget a sequence, pinned or not, or one layer of it; returns how many layers that were. Raises NotFound."""
        if layer is not None:
            self._sequences.layer(key, layer)
        numbers = list(self._sequences.sequence(key).layers) if layer is None else [layer]
        for number in numbers:
            self._sequences.remove(key, number)
        return len(numbers)

    def pin(self, key: SequenceKey, ttl_s: float | None, now: float) -> None:
        """Keep a sequence from eviction for `ttl_s` seconds, or (None) until it is unpinned. Raises NotFound, or
        BadArgument for a time that is not positive."""
        if ttl_s is not None and not ttl_s > 0:
            raise BadArgument(f"a pin lasts more than 0 seconds, not {ttl_s}")
        self._sequences.sequence(key).pinned_until = math.inf if ttl_s is None else now + ttl_s

    def unpin(self, key: SequenceKey) -> None:
        """Let a sequence be evicted again. Raises NotFound."""
        self._sequences.sequence(key).pinned_until = -math.inf

    def list(
        self, tenant: str, prefix: str, after: str, limit: int, now: float
    ) -> tuple[tuple[SequenceInfo, ...], bool]:
        """A tenant's sequences whose id starts with `prefix` and comes behind `after`, in the order of their ids.

        At most `limit`; also says whether there are more.
        """
        matching = (
            key
            for key, _ in self._sequences.stored()
            if key.tenant == tenant and key.seq_id > after and key.seq_id.startswith(prefix)
        )
        names = heapq.nsmallest(limit + 1, matching)
        return tuple(self._sequences.describe(key, now) for key in names[:limit]), len(names) > limit

    def stats(self, now: float) -> StoreStats:
        """Room is counted in whole pages."""
        pages, page_bytes = self._sequences.pages, self._sequences.page_bytes
        stored = [sequence for _, sequence in self._sequences.stored()]
        return StoreStats(
            capacity_bytes=pages.num_pages * page_bytes,
            used_bytes=(pages.num_pages - pages.num_free) * page_bytes,
            pinned_bytes=sum(sequence.num_pages for sequence in stored if sequence.pinned_until > now) * page_bytes,
            sequences=len(stored),
            evictions=self._sequences.num_evicted,
            **self._totals,
        )

    def check(self) -> None:
        """Assert that every page and every holder is accounted for."""
        self._sequences.check()

    # --- helpers ---

    def _begin(self, transfer: Transfer, now: float, *, may_evict: bool = True) -> Transfer:
        self._sequences.hold(transfer.key, transfer.layer)
        if transfer.kind is Kind.VERIFY:
            return transfer
        transfer.layer.appender = transfer
        try:
            self._sequences.reserve(transfer.layer, transfer.start + transfer.num_tokens, now, may_evict=may_evict)
        except NoSpace:
            self._end(transfer)
            raise
        return transfer

    def _end(self, transfer: Transfer) -> None:
        """Whatever was not committed is freed: an unplaced layer whole, an append's pages behind the layer's end."""
        transfer.is_open = False
        layer = transfer.layer
        if transfer.kind is not Kind.VERIFY:
            layer.appender = None
            if layer is self._sequences.find(transfer.key, transfer.layer_number):
                self._sequences.trim(layer)
            else:
                layer.retired = True
        self._sequences.let_go(transfer.key, layer)


def _check_target(key: SequenceKey, layer: int) -> None:
    if not key.seq_id:
        raise BadArgument("the sequence needs a name of at least one character")
    if not 0 <= layer < 2**32:
        raise BadArgument(f"layer must be from 0 to {2**32 - 1}, not {layer}")


def _shaped(meta: TensorMeta, num_tokens: int) -> TensorMeta:
    return TensorMeta(meta.dtype, (num_tokens, *meta.shape[1:]))
