"""The prefix index and the cache made of it and the pool: what is found, what never is, and what is told of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.hashing import BlockHash, HashSeed, block_digests, encode_token_ids
from workers.batch import BlockId
from workers.nodes import MAX_NODES_PER_BLOCK, NodeChange
from workers.prefix import PrefixIndex
from workers.prefix_cache import PrefixCache

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


def test_allocation_evicts_leaf_first_and_tells_of_the_nodes_that_go() -> None:
    cache = PrefixCache(3, 2)
    table = compute(cache, [1, 2, 3, 4, 5, 6])
    for number, block in enumerate(table):
        cache.attach(block, "t", b"node-%d" % number)
    cache.attach(table[0], "t", b"node-0")  # said twice, it is one
    cache.pool.unpin(table)
    assert cache.take_node_changes() == tuple(NodeChange("t", b"node-%d" % number, True) for number in range(3))
    assert cache.allocate(4) is None
    assert cache.allocate(2) == [table[1], table[2]]
    assert find(cache, [1, 2, 3, 4]) == table[:1]
    assert cache.take_node_changes() == (NodeChange("t", b"node-2", False), NodeChange("t", b"node-1", False))
    assert cache.take_node_changes() == ()
    cache.check()


def test_nodes_are_attached_to_findable_blocks_only_and_leave_with_them() -> None:
    cache = PrefixCache(4, 2)
    (unfindable,) = cache.allocate(1) or []
    cache.attach(unfindable, "t", b"a")
    assert cache.take_node_changes() == ()
    table = compute(cache, [1, 2])
    cache.attach(table[0], "t", b"b")
    cache.withdraw(table[0])
    cache.attach(table[0], "t", b"c")
    assert cache.take_node_changes() == (NodeChange("t", b"b", True), NodeChange("t", b"b", False))
    cache.pool.unpin([*table, unfindable])
    again = compute(cache, [3, 4])
    cache.attach(again[0], "t", b"d")
    cache.flush()
    assert cache.take_node_changes() == (NodeChange("t", b"d", True), NodeChange("t", b"d", False))
    cache.pool.unpin(again)


def test_a_block_has_a_bounded_number_of_nodes_and_the_oldest_goes() -> None:
    cache = PrefixCache(1, 2)
    (block,) = compute(cache, [1, 2])
    for number in range(MAX_NODES_PER_BLOCK + 1):
        cache.attach(block, "t", b"%d" % number)
    changes = cache.take_node_changes()
    assert [change for change in changes if not change.is_stored] == [NodeChange("t", b"0", False)]
    assert len(changes) == MAX_NODES_PER_BLOCK + 2
    cache.pool.unpin([block])


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
    for block, node in zip([*mine, *theirs], (b"top", b"leaf", b"other"), strict=True):
        cache.attach(block, "t", node)
    cache.take_node_changes()
    cache.pool.unpin(mine)
    assert cache.flush(lambda seed: seed.cache_salt == "") == 2
    assert find(cache, [1, 2, 3, 4]) == []
    assert find(cache, [1, 2], other) == theirs
    assert cache.take_node_changes() == (NodeChange("t", b"leaf", False), NodeChange("t", b"top", False))
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
