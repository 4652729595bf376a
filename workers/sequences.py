"""Sequences and the blocks they hold: the running ones, and those retained under a client's name.

A retained sequence keeps its KV after its generation, the partial last block included, so that it can be read
and gone on with. It is evicted whole, least recently used first, when blocks run short and it is not pinned:
its full blocks then become cached, its tail is free. All that hands out blocks here is all-or-nothing.

    0                    num_computed        len(token_ids)
    |------- KV in the block table -|-- not yet computed --|
    |-- full blocks, findable --|tail|

Invariant: a sequence writes only into blocks that nobody else holds and that nobody can find. A block that goes
on like it for a while, and then otherwise, is copied: that far the copy needs no computing.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from itertools import chain

from bus.errors import Conflict, NoSpace, NotFound
from kvcache.hashing import TOKEN_BYTES, BlockHash, HashSeed, block_digests, encode_token_ids, extend
from workers.batch import BlockId, Slice
from workers.hits import HitTable
from workers.keys import SequenceKey
from workers.loans import LoanId, Loans
from workers.nodes import Landmark
from workers.prefix_cache import PrefixCache


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt with its growing output. Only the table touches all but the tokens.

    num_kept: so many of its computed tokens stay under its name even if it has to give up its blocks: those that it
    has taken over from there, or had when it was pinned.
    copy: a block, and one of its own that it is still to be copied to; computed tokens count on it.
    landmarks: where the nodes of its chain end; the first `num_marked` of them are attached to their blocks.
    num_to_score: so many leading tokens are each followed by one whose logprob is to be told, with `num_top` likeliest
    ones; of `num_scored` that was done. It takes logits, so what was not scored is not taken from other sequences.
    """

    seed: HashSeed
    token_ids: list[int]
    key: SequenceKey | None = None
    landmarks: tuple[Landmark, ...] = ()
    num_to_score: int = 0
    num_top: int = 0
    num_scored: int = 0
    block_table: list[BlockId] = field(default_factory=list)
    num_computed: int = 0
    num_kept: int = 0
    num_published: int = 0
    copy: tuple[BlockId, BlockId] | None = None
    num_marked: int = 0
    digests: list[BlockHash] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = list(block_digests(self.seed, self.token_ids))

    @property
    def num_left(self) -> int:
        """Tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed

    @property
    def is_scored(self) -> bool:
        """Whether all that is to be told of its prompt was told."""
        return self.num_scored == self.num_to_score

    @property
    def num_reusable(self) -> int:
        """How many of its tokens need no computing if the pool has them: all but the last, whose logits are needed."""
        return len(self.token_ids) - 1 if self.is_scored else self.num_scored

    @property
    def next_block(self) -> BlockHash | None:
        """Digest of the block into which its next token goes, if it has all the tokens of that block."""
        index = self.num_computed // self.seed.block_size
        return self.digests[index] if index < len(self.digests) else None

    def next_slice(self, num_tokens: int) -> Slice:
        """The next `num_tokens` of them for a forward pass; blocks for them must be held."""
        stop = self.num_computed + num_tokens
        scored_stop = self.num_computed if self.is_scored else min(stop, self.num_to_score)
        return Slice(
            token_ids=tuple(self.token_ids[self.num_computed : stop]),
            start=self.num_computed,
            block_table=tuple(self.block_table),
            wants_logits=stop == len(self.token_ids),
            targets=tuple(self.token_ids[self.num_computed + 1 : scored_stop + 1]),
            num_top=self.num_top,
        )

    def append(self, token_id: int) -> None:
        """Add the newest token; the digest chain grows with each full block."""
        self.token_ids.append(token_id)
        size = self.seed.block_size
        if len(self.token_ids) % size == 0:
            parent = self.digests[-1] if self.digests else self.seed.root
            self.digests.append(extend(self.seed, parent, self.token_ids[-size:]))


@dataclass(frozen=True, slots=True)
class _Found:
    """Blocks to share, one to copy the beginning of, if any, and how many tokens that makes together."""

    blocks: list[BlockId]
    alike: BlockId | None
    num_tokens: int


class SequenceTable:
    """Gives blocks to sequences and takes them back. One writer per name: a second one gets Conflict.

    evictions: of whole retained sequences, so far. copied_tokens: found in blocks that go on otherwise.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self.cache = cache
        self.loans = Loans(cache)
        self._live: set[Sequence] = set()
        self._claimed: dict[SequenceKey, Sequence] = {}
        self._retained: OrderedDict[SequenceKey, Sequence] = OrderedDict()
        self._pins: dict[SequenceKey, float] = {}
        self._stirred: set[SequenceKey] = set()
        self.hits = HitTable()
        self.evictions = 0
        self.copied_tokens = 0

    # --- the life of a running sequence ---

    def begin(self, sequence: Sequence) -> None:
        """Begin a sequence, the one writer of its name (if it has one) until `end`. Raises Conflict if there is one."""
        if sequence.key is not None:
            other = self._claimed.get(sequence.key)
            if other is not None:
                message = f"sequence {sequence.key.seq_id!r} is being generated; wait for its end or cancel it"
                raise Conflict(message, detail=other.num_computed)
            self._claimed[sequence.key] = sequence
        self._live.add(sequence)

    def admit(self, sequence: Sequence, num_blocks: int, now: float) -> int | None:
        """Fill an empty block table up to `num_blocks`, reusing what is there already.

        Reuses the retained sequence of its name or the longest findable prefix, whichever has more tokens, and
        leaves `num_reusable` aside to compute. Returns how many tokens need no computing, or None, with
        nothing changed, if there is no room. `Sequence.copy` is then to be made in the very next step.
        """
        kept = None if sequence.key is None else self._retained.get(sequence.key)
        num_kept = 0 if kept is None else self._num_reusable(kept, sequence)
        found = self._find(sequence)
        if kept is not None and num_kept >= found.num_tokens and num_kept > len(found.blocks) * self.cache.block_size:
            admitted = self._take_over(kept, sequence, num_kept, num_blocks, now)
        else:
            admitted = self._share(sequence, found, num_blocks, now)
        if not admitted:
            return None
        self._mark(sequence)
        self.hits.count(sequence.seed, lookup_tokens=len(sequence.token_ids), hit_tokens=sequence.num_computed)
        return sequence.num_computed

    def num_missing(self, sequence: Sequence) -> int:
        """How many of its tokens would be left to compute if it were admitted now."""
        kept = None if sequence.key is None else self._retained.get(sequence.key)
        num_kept = 0 if kept is None else self._num_reusable(kept, sequence)
        return len(sequence.token_ids) - max(num_kept, self._find(sequence).num_tokens)

    def grow(self, sequence: Sequence, num_tokens: int, now: float) -> bool:
        """Have blocks for `num_tokens` tokens; False, with nothing changed, if there is no room."""
        need = self._blocks_for(num_tokens) - len(sequence.block_table)
        if need <= 0:
            return True
        if need > self._obtainable(need, now):
            return False
        sequence.block_table += self._allocate(need, now)
        return True

    def has_room(self, sequence: Sequence, num_blocks: int, now: float, leaving: Iterable[BlockId]) -> bool:
        """Whether `admit` would find room once the holders of `leaving` have let go of them."""
        shared = self._find(sequence).blocks
        need = num_blocks - len(shared)
        self.cache.pool.pin(shared)
        room = self._obtainable(need, now, leaving)
        self.cache.pool.unpin(shared)
        return need <= room

    def catch_up(self, sequence: Sequence) -> int:
        """Share the next blocks that others have computed since it was admitted; returns the tokens that saves.

        As in `admit`, no more than `num_reusable`. The blocks that were meant for them are let go.
        """
        size = self.cache.block_size
        before = sequence.num_computed
        for i in range(sequence.num_published, sequence.num_reusable // size):
            parent = sequence.block_table[i - 1] if i else None
            tokens = encode_token_ids(sequence.token_ids[i * size : (i + 1) * size])
            found = self.cache.exchange(sequence.block_table[i], sequence.digests[i], parent, tokens)
            if found is None:
                break
            self.cache.pool.count_hits([found])
            sequence.copy = None  # it was for this block
            sequence.block_table[i] = found
            sequence.num_published = i + 1
            sequence.num_computed = (i + 1) * size
        self._mark(sequence)
        num_saved = sequence.num_computed - before
        if num_saved:
            self.hits.count(sequence.seed, hit_tokens=num_saved)
        return num_saved

    def advance(self, sequence: Sequence, num_computed: int) -> None:
        """Tokens below `num_computed` are in the blocks now; blocks that became full can be found from now on."""
        sequence.num_computed = num_computed
        sequence.num_scored = max(sequence.num_scored, min(num_computed, sequence.num_to_score))
        size = self.cache.block_size
        for i in range(sequence.num_published, num_computed // size):
            parent = sequence.block_table[i - 1] if i else None
            tokens = encode_token_ids(sequence.token_ids[i * size : (i + 1) * size])
            block = sequence.block_table[i]
            sequence.block_table[i] = self.cache.publish(block, sequence.digests[i], parent, tokens, sequence.seed)
            sequence.num_published = i + 1
        self._mark(sequence)

    def shorten(self, sequence: Sequence, num_tokens: int) -> None:
        """Forget the tokens behind the first `num_tokens`, and leave of the KV what it would have at that length.

        As after any token that was sampled last, that one's own KV is not computed. For a sequence about to end.
        """
        tokens = sequence.token_ids[:num_tokens]
        if sequence.num_computed >= num_tokens:
            self._cut(sequence, num_tokens - 1)
            sequence.num_published = min(sequence.num_published, sequence.num_computed // self.cache.block_size)
        sequence.token_ids[:] = tokens

    def copied(self, sequence: Sequence) -> None:
        """Its copy was made."""
        sequence.copy = None

    def give_up(self, sequence: Sequence) -> None:
        """Take the blocks back from one that is to wait again; what its name stood for is kept under it once more."""
        if sequence.key is not None and sequence.num_kept > 0:
            kept = Sequence(sequence.seed, sequence.token_ids[: sequence.num_kept], sequence.key)
            kept.block_table = sequence.block_table[: self._blocks_for(sequence.num_kept)]
            kept.num_computed = sequence.num_kept
            self.cache.pool.pin(kept.block_table)
            self._retain(sequence.key, kept)
        sequence.num_kept = 0
        self._release(sequence)

    def to_give_up(self, sequence: Sequence, now: float) -> AbstractSequence[BlockId]:
        """The blocks that others could have if it gave up its own: not those that its pinned name is to keep."""
        if sequence.key is None or not self.is_pinned(sequence.key, now):
            return sequence.block_table
        return sequence.block_table[self._blocks_for(sequence.num_kept) :]

    def end(self, sequence: Sequence) -> None:
        """The sequence runs no more. If it has a name, its computed part is kept under it, however it ended.

        One that has computed nothing leaves what its name stood for before. Its tokens are cut to what is kept.
        """
        self._live.remove(sequence)
        if sequence.copy is not None:  # it was not made, so there is nothing behind the shared blocks
            sequence.num_computed = sequence.num_published * self.cache.block_size
            sequence.copy = None
        key = sequence.key
        if key is not None:
            del self._claimed[key]
            self._stirred.add(key)
        if key is not None and sequence.num_computed > 0:
            self._retain(key, sequence)
        else:
            self._release(sequence)
        if key is not None and key not in self._retained:
            self._pins.pop(key, None)

    # --- what clients ask of named sequences ---

    def find(self, key: SequenceKey) -> Sequence:
        """The sequence of that name, running or retained, for reading `num_computed` tokens. Raises NotFound."""
        running = self._claimed.get(key)
        if running is not None and running.num_computed > 0:
            return running
        retained = self._retained.get(key)
        if retained is None:
            raise NotFound(f"no KV is kept for sequence {key.seq_id!r}; it may have been evicted")
        return retained

    def use(self, key: SequenceKey) -> Sequence:
        """As `find`, and it counts as used just now, which looking at a list of sequences does not."""
        found = self.find(key)
        if key in self._retained:
            self._retained.move_to_end(key)
        return found

    def delete(self, key: SequenceKey) -> None:
        """Forget a retained sequence, pinned or not. Raises NotFound, or Conflict while it is being generated."""
        if key in self._claimed:
            raise Conflict(f"sequence {key.seq_id!r} is being generated; cancel it first")
        self.find(key)
        self._drop(key)

    def pin(self, key: SequenceKey, expires_at: float) -> None:
        """Keep it from eviction until `expires_at` (monotonic seconds, `math.inf` for ever). Raises NotFound.

        Of one that is being generated this holds for what is computed by now, and after its end for all of it.
        """
        found = self.find(key)
        found.num_kept = found.num_computed
        self._pins[key] = expires_at

    def unpin(self, key: SequenceKey) -> None:
        """Let it be evicted again. Raises NotFound."""
        self.find(key)
        self._pins.pop(key, None)

    def is_pinned(self, key: SequenceKey, now: float) -> bool:
        return key in self._pins and self._pins[key] > now

    def has(self, key: SequenceKey) -> bool:
        """Whether `find` would find it."""
        running = self._claimed.get(key)
        return key in self._retained or (running is not None and running.num_computed > 0)

    def names(self) -> list[SequenceKey]:
        """The names that `find` would find, in order."""
        return sorted(self._retained.keys() | filter(self.has, self._claimed))

    def take_stirred(self) -> set[SequenceKey]:
        """The names that `has` may answer otherwise for than at the last call; all others are as they were. It spares
        each step a look at every sequence that is kept."""
        stirred, self._stirred = self._stirred | self._claimed.keys(), set()
        return stirred

    # --- blocks that come from other workers ---

    def fill_loan(
        self,
        loan: LoanId,
        digests: AbstractSequence[BlockHash],
        tokens: AbstractSequence[bytes],
        seed: HashSeed,
        write: Callable[[AbstractSequence[BlockId]], None],
        now: float,
    ) -> int:
        """Add blocks to an open loan, see `Loans.fill`, with room as for a sequence that waits: nobody is preempted.

        Raises NotFound if the loan was revoked, NoSpace if there is no room, and what `write` raises.
        """
        self.loans.blocks(loan)
        if len(digests) > self._obtainable(len(digests), now, takes_loans=False):
            raise NoSpace(f"no room for {len(digests)} blocks from another worker: all others are in use")
        fresh = self._allocate(len(digests), now, takes_loans=False)
        return self.loans.fill(loan, fresh, digests, tokens, seed, write)

    def check(self) -> None:
        """Assert that every reference the pool counts is that of a sequence here, and the pool's own invariants."""
        self.cache.check()
        holders = Counter(block for sequence in self._live for block in sequence.block_table)
        holders.update(block for sequence in self._retained.values() for block in sequence.block_table)
        holders.update(self.loans.held())
        for block in map(BlockId, range(self.cache.pool.num_blocks)):
            assert self.cache.pool.ref_count(block) == holders[block], f"block {block} is held by nobody known"
        assert self._pins.keys() <= self._claimed.keys() | self._retained.keys(), "a pin outlived its sequence"

    # --- reuse ---

    def _mark(self, sequence: Sequence) -> None:
        """Attach the nodes of its chain to those of its blocks that can be found by now."""
        landmarks = sequence.landmarks
        while sequence.num_marked < len(landmarks):
            index, node = landmarks[sequence.num_marked]
            if index >= sequence.num_published:
                return
            self.cache.attach(sequence.block_table[index], sequence.seed.tenant, node)
            sequence.num_marked += 1

    def _retain(self, key: SequenceKey, sequence: Sequence) -> None:
        before = self._retained.pop(key, None)
        if before is not None:
            self._release(before)
        self._cut(sequence, sequence.num_computed)
        self._retained[key] = sequence

    def _find(self, sequence: Sequence) -> _Found:
        """What can be found of the tokens that may be reused."""
        size = self.cache.block_size
        limit = sequence.num_reusable
        data = encode_token_ids(sequence.token_ids[:limit])
        blocks = self.cache.longest(sequence.digests[: limit // size], data)
        at = len(blocks) * size
        rest = data[at * TOKEN_BYTES : (at + size) * TOKEN_BYTES]
        alike = self.cache.most_alike(sequence.seed, blocks[-1] if blocks else None, rest)
        return _Found(blocks, alike[0], at + alike[1]) if alike else _Found(blocks, None, at)

    def _num_reusable(self, kept: Sequence, sequence: Sequence) -> int:
        """Tokens of `kept` that `sequence` can take over: the common prefix, less a tail it must not write into."""
        if kept.seed.root != sequence.seed.root:
            return 0
        size = self.cache.block_size
        num = min(_common_prefix(kept.token_ids, sequence.token_ids), sequence.num_reusable)
        if num % size and not self.cache.is_exclusive(kept.block_table[num // size]):
            num -= num % size
        return num

    def _take_over(self, kept: Sequence, sequence: Sequence, num: int, num_blocks: int, now: float) -> bool:
        """Move the first `num` tokens' blocks from the retained sequence, which ends, to the running one."""
        assert sequence.key is not None
        del self._retained[sequence.key]
        surplus = kept.block_table[self._blocks_for(num) :]
        need = num_blocks - self._blocks_for(num)
        if need > self._obtainable(need, now, surplus):
            self._retained[sequence.key] = kept
            return False
        self._cut(kept, num)
        if num % self.cache.block_size:
            self.cache.withdraw(kept.block_table[-1])
        self.cache.pool.count_hits(kept.block_table)
        sequence.block_table = kept.block_table + self._allocate(need, now)
        sequence.num_computed, sequence.num_published = num, num // self.cache.block_size
        sequence.num_kept = num
        return True

    def _share(self, sequence: Sequence, found: _Found, num_blocks: int, now: float) -> bool:
        """Hold the findable blocks with whoever else does, and take fresh ones for the rest, one perhaps for a copy."""
        shared = found.blocks
        self.cache.pool.pin(shared)
        need = num_blocks - len(shared)
        if need > self._obtainable(need, now):
            self.cache.pool.unpin(shared)
            return False
        self.cache.pool.count_hits(shared)
        sequence.block_table = shared + self._allocate(need, now)
        sequence.num_computed = found.num_tokens
        sequence.num_published = len(shared)
        if found.alike is not None:
            # It may just have been evicted, even to be the target. Nothing is written before the copies are made.
            sequence.copy = (found.alike, sequence.block_table[len(shared)])
            self.copied_tokens += found.num_tokens - len(shared) * self.cache.block_size
        return True

    def _cut(self, sequence: Sequence, num_tokens: int) -> None:
        """Shorten to `num_tokens` computed tokens, letting the blocks behind them go."""
        num_blocks = self._blocks_for(num_tokens)
        self.cache.pool.unpin(sequence.block_table[num_blocks:])
        del sequence.block_table[num_blocks:]
        del sequence.token_ids[num_tokens:]
        del sequence.digests[num_tokens // self.cache.block_size :]
        sequence.num_computed = num_tokens

    # --- room ---

    def _obtainable(self, num: int, now: float, leaving: Iterable[BlockId] = (), *, takes_loans: bool = True) -> int:
        """How many blocks could be had, counted no further than `num` needs it.

        A held block comes free when all its holders are loans, retained sequences that may be evicted, or `leaving`.
        """
        pool, room = self.cache.pool, self.cache.pool.num_available
        lent = self.loans.held() if takes_loans else ()
        retained = (self._retained[key].block_table for key in self._evictable(now))
        holders: Counter[BlockId] = Counter()
        for block in chain(leaving, lent, chain.from_iterable(retained)):
            if room >= num:
                break
            holders[block] += 1
            room += holders[block] == pool.ref_count(block)
        return room

    def _allocate(self, num: int, now: float, *, takes_loans: bool = True) -> list[BlockId]:
        """Take `num` obtainable blocks: loans go first, then retained sequences one by one as far as it needs."""
        if takes_loans and self.cache.pool.num_available < num:
            self.loans.revoke()
        while self.cache.pool.num_available < num:
            self._drop(next(self._evictable(now)))
            self.evictions += 1
        blocks = self.cache.allocate(max(0, num))
        assert blocks is not None, "blocks were counted as obtainable that are not"
        return blocks

    def _evictable(self, now: float) -> Iterator[SequenceKey]:
        """Names of retained sequences that are not pinned, least recently used first."""
        return (key for key in self._retained if not self.is_pinned(key, now))

    def _drop(self, key: SequenceKey) -> None:
        self._release(self._retained.pop(key))
        self._pins.pop(key, None)
        self._stirred.add(key)

    def _release(self, sequence: Sequence) -> None:
        """Take all its blocks back; what was full can still be found."""
        self.cache.pool.unpin(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = sequence.num_published = sequence.num_marked = 0
        sequence.copy = None

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.cache.block_size)


def _common_prefix(one: list[int], two: list[int]) -> int:
    """Length of the longest common prefix; quick when one list goes on where the other ends."""
    shorter = min(len(one), len(two))
    if one[:shorter] == two[:shorter]:
        return shorter
    return next(i for i in range(shorter) if one[i] != two[i])
