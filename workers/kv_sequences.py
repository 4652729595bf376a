"""Who has which pages of the KV store: sequences, their layers, who holds them, and what is evicted for room.

    placed   found under its sequence and number; its pages are its own
    held     being read or written (`holders` > 0), placed or not: a put in progress is held and not yet placed
    retired  replaced, deleted or given up: no longer placed; its pages are free when the last holder lets go

Eviction takes whole sequences, least recently held first, and none that is pinned or has a holder. No bytes are
touched here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from bus.errors import NoSpace, NotFound
from bus.stats import LayerInfo, SequenceInfo
from bus.tensors import TensorMeta
from workers.keys import SequenceKey
from workers.pages import ByteRun, Extent, PagePool
from workers.transfers import Layer, row_bytes


@dataclass(slots=True, eq=False)
class KVSequence:
    """The placed layers of one sequence. pinned_until: monotonic seconds."""

    layers: dict[int, Layer] = field(default_factory=dict)
    holders: int = 0
    pinned_until: float = -math.inf

    @property
    def num_pages(self) -> int:
        return sum(layer.num_pages for layer in self.layers.values())


class KVSequences:
    """Sequences over `num_pages` pages of `page_bytes`."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.pages = PagePool(num_pages)
        self.page_bytes = page_bytes
        self.num_evicted = 0
        self.evicted: list[SequenceKey] = []
        self._sequences: OrderedDict[SequenceKey, KVSequence] = OrderedDict()  # least recently held first
        self._held: set[Layer] = set()

    # --- finding ---

    def find(self, key: SequenceKey, number: int) -> Layer | None:
        """The placed layer, or None."""
        sequence = self._sequences.get(key)
        return None if sequence is None else sequence.layers.get(number)

    def layer(self, key: SequenceKey, number: int) -> Layer:
        """The placed layer. Raises NotFound."""
        found = self.find(key, number)
        if found is None:
            raise NotFound(f"layer {number} of sequence {key.seq_id!r} is not stored; it may have been evicted")
        return found

    def sequence(self, key: SequenceKey) -> KVSequence:
        """A sequence that has placed layers. Raises NotFound."""
        if not self.has(key):
            raise NotFound(f"sequence {key.seq_id!r} is not stored; it may have been evicted")
        return self._sequences[key]

    def has(self, key: SequenceKey) -> bool:
        """Whether it has placed layers."""
        return key in self._sequences and bool(self._sequences[key].layers)

    def stored(self) -> Iterator[tuple[SequenceKey, KVSequence]]:
        """All sequences that have placed layers."""
        return ((key, sequence) for key, sequence in self._sequences.items() if sequence.layers)

    def describe(self, key: SequenceKey, now: float) -> SequenceInfo:
        """What is stored of a sequence. Raises NotFound."""
        sequence = self.sequence(key)
        nbytes = sum(layer.length * (row_bytes(layer.k) + row_bytes(layer.v)) for layer in sequence.layers.values())
        layers = tuple(_layer_info(number, layer) for number, layer in sorted(sequence.layers.items()))
        return SequenceInfo(
            seq_id=key.seq_id,
            kind="stored",
            nbytes=nbytes,
            pinned=sequence.pinned_until > now,
            layers=layers,
            num_tokens=max(info.length for info in layers),
        )

    # --- changing ---

    def new_layer(self, k: TensorMeta, v: TensorMeta) -> Layer:
        """A layer without pages, that nobody finds before it is placed. Only what a token is counts of `k` and `v`."""
        return Layer(k, v, ByteRun(self.page_bytes), ByteRun(self.page_bytes))

    def hold(self, key: SequenceKey, layer: Layer) -> None:
        """Keep the layer's pages, and its sequence from eviction, until `let_go`."""
        sequence = self._sequences.setdefault(key, KVSequence())
        self._sequences.move_to_end(key)
        sequence.holders += 1
        layer.holders += 1
        self._held.add(layer)

    def let_go(self, key: SequenceKey, layer: Layer) -> None:
        """End a `hold`."""
        self._sequences[key].holders -= 1
        layer.holders -= 1
        if layer.holders == 0:
            self._held.remove(layer)
            if layer.retired:
                self._free(layer)
        self._forget_if_empty(key)

    def reserve(self, layer: Layer, num_tokens: int, now: float, *, may_evict: bool = True) -> None:
        """Have pages for `num_tokens` tokens in a held layer, evicting as far as needed, if anything may be.

        Raises NoSpace, with nothing changed, if there is no room to be had.
        """
        k_bytes, v_bytes = num_tokens * row_bytes(layer.k), num_tokens * row_bytes(layer.v)
        k_pages, v_pages = layer.k_run.pages_to_hold(k_bytes), layer.v_run.pages_to_hold(v_bytes)
        self._make_room(k_pages + v_pages, now, may_evict=may_evict)
        for run, num_pages in ((layer.k_run, k_pages), (layer.v_run, v_pages)):
            extents = self.pages.allocate(num_pages, after=run.next_page)
            assert extents is not None, "room was made that is not there"
            run.extend(extents)

    def place(self, key: SequenceKey, number: int, layer: Layer) -> None:
        """Make a held layer the one that is found, retiring the one before."""
        before = self.find(key, number)
        if before is not None:
            self._retire(before)
        self._sequences[key].layers[number] = layer

    def remove(self, key: SequenceKey, number: int) -> None:
        """Retire a placed layer; the pin goes with the last one, even while the sequence is held."""
        sequence = self._sequences[key]
        self._retire(sequence.layers.pop(number))
        if not sequence.layers:
            sequence.pinned_until = -math.inf
        self._forget_if_empty(key)

    def trim(self, layer: Layer) -> None:
        """Free the pages behind a layer's last token."""
        for run, meta in ((layer.k_run, layer.k), (layer.v_run, layer.v)):
            self.pages.free(run.trim(layer.length * row_bytes(meta)))

    def check(self) -> None:
        """Assert that every page is free or of exactly one layer, and that holders and lengths agree."""
        placed = {layer for sequence in self._sequences.values() for layer in sequence.layers.values()}
        used: list[Extent] = []
        for layer in placed | self._held:
            assert (layer.holders > 0) == (layer in self._held), "a layer's holders are miscounted"
            assert layer not in placed or not layer.retired, "a retired layer can be found"
            assert layer.k_run.pages_to_hold(layer.length * row_bytes(layer.k)) == 0, "keys lack pages"
            assert layer.v_run.pages_to_hold(layer.length * row_bytes(layer.v)) == 0, "values lack pages"
            used += [*layer.k_run.extents, *layer.v_run.extents]
        self.pages.check(used)
        for sequence in self._sequences.values():
            assert sequence.layers or sequence.holders, "an empty sequence was not forgotten"
        holders = sum(sequence.holders for sequence in self._sequences.values())
        assert holders == sum(layer.holders for layer in self._held), "sequences and layers count other holders"

    # --- room ---

    def _make_room(self, num_pages: int, now: float, *, may_evict: bool) -> None:
        if num_pages <= self.pages.num_free:
            return
        capacity = self.pages.num_pages * self.page_bytes
        if num_pages > self.pages.num_pages:
            raise NoSpace(f"{num_pages * self.page_bytes} bytes can never fit the store's {capacity}", detail=capacity)
        evictable = [key for key, sequence in self._sequences.items() if may_evict and _may_go(sequence, now)]
        obtainable = self.pages.num_free + sum(self._sequences[key].num_pages for key in evictable)
        if num_pages > obtainable:
            free = obtainable * self.page_bytes
            message = f"{num_pages * self.page_bytes} bytes are needed and {free} can be freed of {capacity}"
            raise NoSpace(f"{message}: the others are pinned or in use", detail=free)
        for key in evictable:
            if num_pages <= self.pages.num_free:
                break
            for layer in self._sequences.pop(key).layers.values():
                self._retire(layer)
            self.num_evicted += 1
            self.evicted.append(key)

    def _retire(self, layer: Layer) -> None:
        layer.retired = True
        if layer.holders == 0:
            self._free(layer)

    def _free(self, layer: Layer) -> None:
        self.pages.free([*layer.k_run.extents, *layer.v_run.extents])

    def _forget_if_empty(self, key: SequenceKey) -> None:
        sequence = self._sequences[key]
        if not sequence.layers and not sequence.holders:
            del self._sequences[key]


def _may_go(sequence: KVSequence, now: float) -> bool:
    return sequence.holders == 0 and sequence.pinned_until <= now


def _layer_info(number: int, layer: Layer) -> LayerInfo:
    k_shape, v_shape = ((layer.length, *meta.shape[1:]) for meta in (layer.k, layer.v))
    return LayerInfo(
        layer=number, length=layer.length, k_shape=k_shape, v_shape=v_shape, dtype=layer.k.dtype.name.lower()
    )
