"""The prefix index and the cache made of it and the pool: what is found, what never is, and what is told of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.hashing import BlockHash, HashSeed, block_digests, encode_token_ids
from workers.batch import BlockId
from workers.prefix import BlockRemoved, BlockStored, Cleared, PrefixIndex
from workers.prefix_cache import MAX_EVENTS, PrefixCache

SEED = HashSeed(model="m", dtype="float32", block_size=2)


def compute(cache: PrefixCache, tokens: list[int], seed: HashSeed = SEED) -> list[BlockId]:
    """What a sequence does: take blocks, fill them, publish them in order. Returns its block table."""
    table = cache.allocate(len(tokens) // 2)
    assert table is not None
    data = encode_token_ids(tokens)
    for position, digest in enumerate(block_digests(seed, tokens)):
        parent = table[position - 1] if position else None
        table[position] = cache.publish(table[position], digest, parent, data[position * 8 : position * 8 + 8], seed)
    return table


def find(cache: PrefixCache, tokens: list[int], seed: HashSeed = SEED) -> list[BlockId]:
    return cache.longest(block_digests(seed, tokens), encode_token_ids(tokens))


def test_longest_prefix_stops_at_the_first_difference() -> None:
    cache = PrefixCache(8, 2)
    table = compute(cache, [1, 2, 3, 4, 5, 6])
    assert find(cache, [1, 2, 3, 4, 5, 6, 7]) == table
    assert find(cache, [1, 2, 3, 4, 9, 6]) == table[:2]
    assert find(cache, [9, 2, 3, 4]) == []
    assert find(cache, [1]) == []
    cache.check()


def test_other_tenants_never_find_it() -> None:
    cache = PrefixCache(8, 2)
    compute(cache, [1, 2, 3, 4])
    assert find(cache, [1, 2, 3, 4], HashSeed(model="m", dtype="float32", block_size=2, tenant="other")) == []


def test_hit_needs_equal_token_ids_and_not_only_an_equal_digest() -> None:
    index = PrefixIndex(1)
    digest = BlockHash(b"d" * 32)
    index.insert(BlockId(0), digest, None, b"\x01\0\0\0", SEED)
    assert index.longest([digest], b"\x01\0\0\0") == [0]
    assert index.longest([digest], b"\x02\0\0\0") == []


def test_hit_needs_the_same_parent_and_not_only_an_equal_block() -> None:
    """A chain that goes on below a colliding block must not lead to the KV of the other one's children."""
    index = PrefixIndex(1)
    top, below = BlockHash(b"t" * 32), BlockHash(b"b" * 32)
    index.insert(BlockId(0), top, None, b"aaaa", SEED)
    index.insert(BlockId(1), below, BlockId(0), b"bbbb", SEED)
    assert index.longest([top, below], b"aaaabbbb") == [0, 1]
    assert index.longest([below], b"bbbb") == []


def test_colliding_digest_is_not_indexed_and_nothing_below_it_either() -> None:
    cache = PrefixCache(4, 1)
    blocks = cache.allocate(3)
    assert blocks is not None
    collided = BlockHash(b"c" * 32)
    assert cache.publish(blocks[0], collided, None, b"aaaa", SEED) == blocks[0]
    assert cache.publish(blocks[1], collided, None, b"bbbb", SEED) == blocks[1]
    assert cache.publish(blocks[2], BlockHash(b"x" * 32), blocks[1], b"cccc", SEED) == blocks[2]
    assert cache.longest([collided], b"aaaa") == [blocks[0]]
    assert cache.longest([collided], b"bbbb") == []
    cache.pool.unpin(blocks)
    assert cache.pool.counts().cached == 1
    cache.check()


def test_equal_blocks_computed_twice_share_one_block() -> None:
    cache = PrefixCache(8, 2)
    first = compute(cache, [1, 2, 3, 4])
    second = compute(cache, [1, 2, 3, 4, 5, 6])
    assert second[:2] == first
    assert cache.pool.ref_count(first[0]) == 2
    cache.pool.unpin(first)
    cache.pool.unpin(second)
    assert cache.pool.counts().cached == 3
    cache.check()


def test_allocation_evicts_leaf_first_and_tells_of_it() -> None:
    cache = PrefixCache(3, 2)
    table = compute(cache, [1, 2, 3, 4, 5, 6])
    cache.pool.unpin(table)
    digests = block_digests(SEED, [1, 2, 3, 4, 5, 6])
    assert cache.allocate(4) is None
    assert cache.allocate(2) == [table[1], table[2]]
    assert find(cache, [1, 2, 3, 4]) == table[:1]
    assert cache.events_since(3) == [BlockRemoved(4, digests[2]), BlockRemoved(5, digests[1])]
    cache.check()


def test_events_are_numbered_and_end_where_the_log_does() -> None:
    cache = PrefixCache(2, 2)
    assert cache.events_since(0) == []
    table = compute(cache, [1, 2])
    cache.flush()
    (digest,) = block_digests(SEED, [1, 2])
    assert cache.events_since(0) == [BlockStored(1, digest), Cleared(2)]
    assert cache.events_since(1) == [Cleared(2)]
    cache.pool.unpin(table)
    for _ in range(MAX_EVENTS):
        cache.flush()
    assert cache.events_since(1) is None
    assert cache.events_since(2) is not None


def test_flush_forgets_all_and_what_goes_on_below_is_not_indexed() -> None:
    cache = PrefixCache(4, 2)
    gone = compute(cache, [7, 8])
    cache.pool.unpin(gone)
    table = compute(cache, [1, 2])
    cache.flush()
    assert find(cache, [1, 2]) == find(cache, [7, 8]) == []
    assert cache.pool.counts().cached == 0
    (below,) = cache.allocate(1) or []
    cache.publish(below, block_digests(SEED, [1, 2, 3, 4])[1], table[0], encode_token_ids([3, 4]), SEED)
    cache.pool.unpin([table[0], below])
    assert cache.pool.counts().free == 4
    cache.check()


def test_block_may_be_written_again_only_by_its_one_holder_and_as_a_leaf() -> None:
    cache = PrefixCache(4, 2)
    table = compute(cache, [1, 2, 3, 4])
    assert not cache.is_exclusive(table[0])
    assert cache.is_exclusive(table[1])
    cache.pool.pin(table)
    assert not cache.is_exclusive(table[1])
    cache.pool.unpin(table)
    cache.withdraw(table[1])
    cache.withdraw(table[1])  # a block that was never found needs no withdrawing
    assert find(cache, [1, 2, 3, 4]) == table[:1]
    assert cache.is_exclusive(table[1])
    cache.pool.unpin(table)
    assert cache.pool.counts().cached == 1
    cache.check()


def test_index_refuses_to_lose_a_parent_before_its_children() -> None:
    index = PrefixIndex(1)
    index.insert(BlockId(0), BlockHash(b"t" * 32), None, b"aaaa", SEED)
    index.insert(BlockId(1), BlockHash(b"b" * 32), BlockId(0), b"bbbb", SEED)
    with pytest.raises(AssertionError, match="before its 1 children"):
        index.remove(BlockId(0))


def test_blocks_need_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="at least 1 token, not 0"):
        PrefixCache(4, 0)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=12), st.integers(0, 3)), max_size=25))
def test_found_blocks_always_hold_the_tokens_asked_for(work: list[tuple[list[int], int]]) -> None:
    """Sequences over a tiny alphabet share, end and are evicted; `written` is what each block really holds."""
    cache = PrefixCache(9, 2)
    written: dict[BlockId, tuple[int, ...]] = {}
    running: list[list[BlockId]] = []
    for tokens, num_kept in work:
        data, digests = encode_token_ids(tokens), block_digests(SEED, tokens)
        table = cache.longest(digests, data)
        assert [written[block] for block in table] == [tuple(tokens[: 2 * i + 2]) for i in range(len(table))]
        cache.pool.pin(table)
        fresh = cache.allocate(len(digests) - len(table))
        if fresh is None:
            cache.pool.unpin(table)
        else:
            for i, block in enumerate(fresh, len(table)):
                written[block] = tuple(tokens[: 2 * i + 2])
                table.append(block)
                table[i] = cache.publish(block, digests[i], table[i - 1] if i else None, data[8 * i : 8 * i + 8], SEED)
            running.append(table)
        while len(running) > num_kept:
            cache.pool.unpin(running.pop(0))
        cache.check()
    for table in running:
        cache.pool.unpin(table)
    assert cache.pool.counts().held == 0


def test_block_that_begins_most_alike_is_found_among_its_siblings_only() -> None:
    cache = PrefixCache(16, 2)
    other = HashSeed(model="m", dtype="float32", block_size=2, cache_salt="other")
    table = compute(cache, [1, 2, 3, 4])
    compute(cache, [1, 2, 5, 6])
    compute(cache, [1, 2, 9, 6])
    assert cache.most_alike(SEED, table[0], encode_token_ids([3, 7])) == (table[1], 1)
    assert cache.most_alike(SEED, table[0], encode_token_ids([3])) == (table[1], 1)
    assert cache.most_alike(SEED, table[0], encode_token_ids([3, 4, 5])) == (table[1], 2)
    assert cache.most_alike(SEED, table[0], encode_token_ids([4, 4])) is None
    assert cache.most_alike(SEED, table[1], encode_token_ids([3, 4])) is None
    assert cache.most_alike(SEED, None, encode_token_ids([1, 7])) == (table[0], 1)
    assert cache.most_alike(other, None, encode_token_ids([1, 7])) is None, (
        "another salt's first blocks are not its own"
    )
    cache.flush()
    assert cache.most_alike(SEED, table[0], encode_token_ids([3, 7])) is None


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 300), min_size=3, max_size=3), max_size=12),
    st.lists(st.integers(0, 300), max_size=4),
)
def test_no_sibling_begins_more_alike_than_the_one_found(siblings: list[list[int]], tokens: list[int]) -> None:
    seed = HashSeed(model="m", dtype="float32", block_size=3)
    index = PrefixIndex(3)
    for number, ids in enumerate(siblings):
        index.insert(BlockId(number), block_digests(seed, ids)[0], None, encode_token_ids(ids), seed)

    def alike(ids: list[int]) -> int:
        return next((at for at in range(min(3, len(tokens))) if ids[at] != tokens[at]), min(3, len(tokens)))

    best = max(map(alike, siblings), default=0)
    found = index.most_alike(seed, None, encode_token_ids(tokens))
    assert (0 if found is None else found[1]) == best
    assert found is None or alike(siblings[found[0]]) == best
    index.check()


def test_flush_of_one_salt_leaves_the_others() -> None:
    cache = PrefixCache(8, 2)
    other = HashSeed(model="m", dtype="float32", block_size=2, cache_salt="other")
    mine, theirs = compute(cache, [1, 2, 3, 4]), compute(cache, [1, 2], other)
    cache.pool.unpin(mine)
    since = cache.events_since(0)
    assert cache.flush(lambda seed: seed.cache_salt == "") == 2
    assert find(cache, [1, 2, 3, 4]) == []
    assert find(cache, [1, 2], other) == theirs
    top, leaf = block_digests(SEED, [1, 2, 3, 4])
    assert since is not None
    assert cache.events_since(len(since)) == [BlockRemoved(4, leaf), BlockRemoved(5, top)]
    assert cache.pool.counts().free == 7
    cache.check()


def test_dropped_block_takes_all_that_hang_on_it_along() -> None:
    cache = PrefixCache(16, 2)
    table = compute(cache, [1, 2, 3, 4, 5, 6])
    branch = compute(cache, [1, 2, 3, 4, 7, 8])
    assert cache.drop(table[1]) == 3
    assert find(cache, [1, 2, 3, 4, 5, 6]) == table[:1]
    assert cache.drop(branch[2]) == 0, "it is gone already"
    cache.check()
    cache.pool.unpin(table)
    cache.pool.unpin(branch)
    assert (cache.pool.counts().cached, cache.pool.counts().held) == (1, 0)
    cache.check()
