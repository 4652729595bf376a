"""A write to the KV store that takes more than one piece: what is to come, what has come, and where it goes.

The bytes of K come first in the numbering, then those of V; pieces may come in any order, each byte exactly once.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from dataclasses import dataclass, field

from bus.errors import BadArgument, BadTensor, Conflict, KVCacheError
from bus.tensors import ITEMSIZE, TensorMeta
from workers.keys import SequenceKey
from workers.pages import ByteRun


class Coverage:
    """Which of `nbytes` bytes have come: disjoint intervals in order, neighbours joined."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._starts: list[int] = []
        self._stops: list[int] = []

    @property
    def missing(self) -> int:
        """How many bytes have not come."""
        return self._nbytes + sum(self._starts) - sum(self._stops)

    def add(self, start: int, stop: int) -> None:
        """Count bytes `start .. stop` as come. Raises BadTensor if some of them had come before."""
        index = bisect_right(self._starts, start)
        if (index > 0 and self._stops[index - 1] > start) or (index < len(self._starts) and self._starts[index] < stop):
            raise BadTensor(f"bytes {start} to {stop} overlap bytes that were sent before")
        if index < len(self._starts) and self._starts[index] == stop:
            del self._starts[index]
            stop = self._stops.pop(index)
        if index > 0 and self._stops[index - 1] == start:
            self._stops[index - 1] = stop
        else:
            self._starts.insert(index, start)
            self._stops.insert(index, stop)


@dataclass(eq=False)
class Layer:
    """K and V of one layer of one sequence: rows of bytes in pages, `length` tokens of them visible.

    k, v: `[0, num_kv_heads, head_dim]` with their dtype: what a token is. holders: reads and writes in progress.
    retired: replaced or deleted; its pages are free as soon as nobody holds it.
    """

    k: TensorMeta
    v: TensorMeta
    k_run: ByteRun
    v_run: ByteRun
    length: int = 0
    holders: int = 0
    appender: Transfer | None = None
    retired: bool = False

    @property
    def num_pages(self) -> int:
        return self.k_run.num_pages + self.v_run.num_pages


class Kind(enum.Enum):
    PUT = enum.auto()  # into a layer of its own, which replaces the old one at the commit
    APPEND = enum.auto()  # behind the end of the layer, which is moved at the commit
    VERIFY = enum.auto()  # an append that seems to have been applied before: its bytes are only compared


@dataclass(eq=False)
class Transfer:
    """A write in progress, of `num_tokens` tokens from token `start`."""

    kind: Kind
    key: SequenceKey
    layer_number: int
    layer: Layer
    start: int
    num_tokens: int
    is_open: bool = True
    differs: bool = False
    coverage: Coverage = field(init=False)

    def __post_init__(self) -> None:
        self.k_bytes = self.num_tokens * row_bytes(self.layer.k)
        self.nbytes = self.k_bytes + self.num_tokens * row_bytes(self.layer.v)
        self.coverage = Coverage(self.nbytes)

    def target(self, offset: int, nbytes: int) -> tuple[ByteRun, int]:
        """The run, and the offset in it, of bytes `offset ..` of this transfer. Raises BadTensor for what is not one
        piece of K or of V."""
        stop = offset + nbytes
        if not 0 <= offset < stop <= self.nbytes:
            raise BadTensor(f"bytes {offset} to {stop} are no piece of a transfer of {self.nbytes} bytes")
        if offset < self.k_bytes < stop:
            raise BadTensor(f"bytes {offset} to {stop} hold the end of k (at {self.k_bytes}) and the start of v")
        if offset < self.k_bytes:
            return self.layer.k_run, self.start * row_bytes(self.layer.k) + offset
        return self.layer.v_run, self.start * row_bytes(self.layer.v) + offset - self.k_bytes

    def refusal(self, current: Layer | None) -> KVCacheError | None:
        """Why it cannot be committed when the layer that is found is `current`, or None if it can."""
        length = 0 if current is None else current.length
        if self.coverage.missing:
            return BadTensor(f"{self.coverage.missing} of {self.nbytes} bytes were not sent")
        if self.kind is Kind.VERIFY and self.differs:
            message = f"tokens {self.start} to {self.start + self.num_tokens} are there with other bytes"
            return Conflict(message, detail=length)
        is_fresh = current is None and not self.layer.retired
        if self.kind is not Kind.PUT and current is not self.layer and not is_fresh:
            return Conflict("the layer was replaced or deleted during the append", detail=length)
        return None


def row_bytes(meta: TensorMeta) -> int:
    """Bytes of one token."""
    return ITEMSIZE[meta.dtype] * meta.shape[1] * meta.shape[2]


def place_of_append(layer: Layer, k: TensorMeta, v: TensorMeta, at: int | None) -> tuple[int, Kind]:
    """Where an append to an existing layer starts, and whether it is one or the repetition of one.

    Raises BadTensor if it holds tokens of another kind, Conflict if the layer has another length or is appended to,
    BadArgument for a negative `at`.
    """
    for name, given, stored in (("k", k, layer.k), ("v", v, layer.v)):
        if (given.dtype, given.shape[1:]) != (stored.dtype, stored.shape[1:]):
            has = f"{stored.dtype.name.lower()} [seq_len, {stored.shape[1]}, {stored.shape[2]}]"
            raise BadTensor(f"{name} is {given.dtype.name.lower()} {list(given.shape)}, the layer holds {has}")
    start = layer.length if at is None else at
    if start < 0:
        raise BadArgument(f"at must be at least 0, not {start}")
    if start != layer.length and start + k.shape[0] <= layer.length:
        return start, Kind.VERIFY
    if start != layer.length:
        raise Conflict(f"append at token {start}, but the layer has {layer.length} tokens", detail=layer.length)
    if layer.appender is not None:
        raise Conflict("another append to this layer is under way", detail=layer.length)
    return start, Kind.APPEND
