"""Block events in vLLM's schema, for routers that know it: numbered, encoded, and kept for a while. Core.

As `vllm/distributed/kv_events.py` has it, in its positional form, which decoders of that schema read: a batch is
`[ts, events, data_parallel_rank]`, an event `[tag, fields...]`. A block's hash is the last 8 bytes of its digest as a
big-endian integer. Whoever misses a number asks for it again; numbers begin at 0 when a worker does, and number 0 says
that it holds nothing. Blocks that only their own request can use are not told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple, TypeAlias

import msgspec

from bus.wire import Buffer
from kvcache.hashing import BlockHash, HashSeed
from workers.block_changes import AllDropped, BlockAdded, BlockChange, BlockDropped

KEPT_BATCHES = 10_000
POOL_MEDIUM = "GPU"
"""vLLM's word for the memory that models compute on, whatever that is."""

_SEQ_BYTES = 8
_END = (-1).to_bytes(_SEQ_BYTES, "big", signed=True)
_HASH_BYTES = 8


class BlockStored(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """Blocks that follow on each other. extra_keys: of each block, what besides tokens it is named by."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: list[tuple[str, ...] | None] | None


class BlockRemoved(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    block_hashes: list[int]
    medium: str


class AllBlocksCleared(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    pass


KvEvent: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """ts: seconds since 1970."""

    ts: float
    events: list[KvEvent]
    data_parallel_rank: int = 0


class Numbered(NamedTuple):
    """A batch as it travels: its number in 8 bytes, big-endian, and its msgpack."""

    seq: bytes
    payload: bytes


class KvEventLog:
    """The batches of one worker. kept: how many can be told again."""

    def __init__(self, wall_s: float, *, kept: int = KEPT_BATCHES) -> None:
        self._kept: deque[Numbered] = deque(maxlen=kept)
        self._next = 0
        self._encode = msgspec.msgpack.Encoder().encode
        self._add([AllBlocksCleared()], wall_s)

    def add(self, changes: Sequence[BlockChange], wall_s: float) -> Numbered | None:
        """The next batch, to be published; None if nothing in these changes is for others."""
        events = list(_events(changes))
        return self._add(events, wall_s) if events else None

    def replay(self, request: Sequence[Buffer]) -> Iterator[Sequence[bytes]]:
        """Answers to a request on the replay socket, without its sender: the batches from the number that it names on,
        as far as they are kept, and an end. Of what is no request there are none.

        A REQ's requests have an empty frame before them, and so have their answers.
        """
        *delimiter, start = request or [b""]
        if len(start) != _SEQ_BYTES or any(map(len, delimiter)) or len(delimiter) > 1:
            return
        prefix = [b""] * len(delimiter)
        first = self._next - len(self._kept)
        skipped = max(0, int.from_bytes(start, "big", signed=True) - first)
        for batch in list(islice(self._kept, skipped, None)):
            yield [*prefix, *batch]
        yield [*prefix, _END, b""]

    def _add(self, events: list[KvEvent], wall_s: float) -> Numbered:
        batch = Numbered(self._next.to_bytes(_SEQ_BYTES, "big"), self._encode(EventBatch(wall_s, events)))
        self._kept.append(batch)
        self._next += 1
        return batch


def _events(changes: Iterable[BlockChange]) -> Iterator[KvEvent]:
    """Changes as events in the same order, what follows on each other as one."""
    run: list[BlockChange] = []
    for change in changes:
        if isinstance(change, BlockAdded) and change.seed.adapter:
            continue
        if run and not _goes_on(run[-1], change):
            yield _event(run)
            run = []
        run.append(change)
    if run:
        yield _event(run)


def _goes_on(before: BlockChange, change: BlockChange) -> bool:
    match before, change:
        case BlockAdded(), BlockAdded():
            return change.parent == before.digest
        case BlockDropped(), BlockDropped():
            return True
        case _:
            return False


def _event(run: Sequence[BlockChange]) -> KvEvent:
    match run[0]:
        case BlockAdded() as first:
            added = [change for change in run if isinstance(change, BlockAdded)]
            return BlockStored(
                block_hashes=[_number(change.digest) for change in added],
                parent_block_hash=None if first.parent is None else _number(first.parent),
                token_ids=[token for change in added for token in memoryview(change.tokens).cast("I")],
                block_size=first.seed.block_size,
                lora_id=None,
                medium=POOL_MEDIUM,
                lora_name=None,
                extra_keys=_extra_keys(first, len(added)),
            )
        case BlockDropped():
            dropped = [change for change in run if isinstance(change, BlockDropped)]
            return BlockRemoved([_number(change.digest) for change in dropped], POOL_MEDIUM)
        case AllDropped():
            return AllBlocksCleared()


def _extra_keys(first: BlockAdded, num_blocks: int) -> list[tuple[str, ...] | None] | None:
    """As vLLM has it, a salt is told of a prefix's first block: as a digest here, since knowing it is being let in."""
    if first.parent is not None or not first.seed.cache_salt:
        return None
    return [(_name(first.seed),), *[None] * (num_blocks - 1)]


def _name(seed: HashSeed) -> str:
    return seed.root[:_HASH_BYTES].hex()


def _number(digest: BlockHash) -> int:
    return int.from_bytes(digest[-_HASH_BYTES:], "big")
