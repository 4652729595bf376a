"""Audits: which blocks are looked at, what is held meanwhile, and what follows."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from kvcache.hashing import HashSeed, block_digests, encode_token_ids
from workers.audit import MAX_PENDING, Audit, AuditCounts, Auditor
from workers.batch import BlockId
from workers.prefix_cache import PrefixCache

SEED = HashSeed(model="m", dtype="float32", block_size=2)
TOKENS = (1, 2, 3, 4, 5, 6)


def compute(cache: PrefixCache, tokens: tuple[int, ...]) -> list[BlockId]:
    """Blocks of these tokens, findable and held by nobody."""
    table = cache.allocate(len(tokens) // 2)
    assert table is not None
    data = encode_token_ids(tokens)
    for at, digest in enumerate(block_digests(SEED, tokens)):
        table[at] = cache.publish(table[at], digest, table[at - 1] if at else None, data[8 * at : 8 * at + 8], SEED)
    cache.pool.unpin(table)
    return table


def found(cache: PrefixCache, tokens: tuple[int, ...]) -> list[BlockId]:
    return cache.longest(block_digests(SEED, tokens), encode_token_ids(tokens))


@pytest.fixture
def cache() -> PrefixCache:
    return PrefixCache(8, 2)


def begun(auditor: Auditor) -> Audit:
    audit = auditor.begin()
    assert audit is not None
    return audit


def test_block_is_computed_again_beside_itself_after_the_blocks_before_it(cache: PrefixCache) -> None:
    table = compute(cache, TOKENS)
    auditor = Auditor(cache, 1.0, 0.1)
    auditor.note(SEED, (*TOKENS, 7), 6)
    audits = []
    while (audit := auditor.begin()) is not None:
        assert cache.pool.counts().held == len(audit.path) + 1
        audits.append(audit)
        assert auditor.end(audit, 0.0)
    assert [audit.block for audit in audits] == table
    assert [(audit.piece.start, *audit.piece.token_ids) for audit in audits] == [(0, 1, 2), (2, 3, 4), (4, 5, 6)]
    for audit in audits:
        assert audit.piece.block_table == (*audit.path[:-1], audit.scratch)
        assert audit.scratch not in audit.path
        assert not audit.piece.wants_logits
    assert cache.pool.counts().held == 0
    assert auditor.counts() == AuditCounts(passed=3)
    cache.check()


@pytest.mark.parametrize("difference", [0.11, 1.4, math.inf, math.nan])
def test_block_that_differs_takes_everything_along_that_begins_like_it(cache: PrefixCache, difference: float) -> None:
    compute(cache, TOKENS)
    compute(cache, (1, 2, 8, 8))
    other = compute(cache, (9, 9))
    auditor = Auditor(cache, 1.0, 0.1)
    auditor.note(SEED, TOKENS, 4)
    assert auditor.end(begun(auditor), 0.1)
    assert not auditor.end(begun(auditor), difference)
    assert found(cache, TOKENS) == found(cache, (1, 2, 8, 8)) == []
    assert found(cache, (9, 9)) == other
    assert auditor.counts() == AuditCounts(passed=1, failed=1)
    assert (cache.pool.counts().held, cache.pool.counts().cached) == (0, 1)
    cache.check()


def test_audit_that_cannot_be_made_changes_nothing(cache: PrefixCache) -> None:
    table = compute(cache, TOKENS)
    auditor = Auditor(cache, 1.0, 0.1)
    auditor.note(SEED, TOKENS, 2)
    assert auditor.end(begun(auditor), None)
    assert found(cache, TOKENS) == table
    auditor.note(SEED, TOKENS, 2)
    held = cache.allocate(5)
    assert held is not None
    cache.pool.pin(table)
    assert auditor.begin() is None, "there is no room to compute it in"
    cache.pool.unpin(table)
    cache.pool.unpin(held)
    auditor.note(SEED, TOKENS, 2)
    cache.flush()
    assert auditor.begin() is None, "the block is gone"
    assert auditor.counts() == AuditCounts(skipped=3)
    assert cache.pool.counts().held == 0
    cache.check()


def test_of_more_hits_than_can_be_looked_at_the_oldest_are_skipped(cache: PrefixCache) -> None:
    compute(cache, TOKENS)
    auditor = Auditor(cache, 1.0, 0.1)
    for _ in range(MAX_PENDING):
        auditor.note(SEED, TOKENS, 6)
    assert auditor.counts().skipped == 2 * MAX_PENDING


@pytest.mark.parametrize("num_blocks", [1, 3, 10, 64])
def test_share_is_kept_at_every_place_whatever_the_rhythm_of_requests(num_blocks: int) -> None:
    cache = PrefixCache(num_blocks + 1, 2)
    tokens = tuple(range(2 * num_blocks))
    compute(cache, tokens)
    auditor, places = Auditor(cache, 0.05, 0.1), Counter[int]()
    num_requests = 2000
    for _ in range(num_requests):
        auditor.note(SEED, tokens, len(tokens))
        while (audit := auditor.begin()) is not None:
            places[len(audit.path)] += 1
            auditor.end(audit, 0.0)
    assert set(places) == set(range(1, num_blocks + 1))
    assert all(0.8 < count / (0.05 * num_requests) < 1.2 for count in places.values()), places


def test_without_a_share_nothing_is_looked_at_and_partial_blocks_never(cache: PrefixCache) -> None:
    compute(cache, TOKENS)
    none, all_of_them = Auditor(cache, 0.0, 0.1), Auditor(cache, 1.0, 0.1)
    none.note(SEED, TOKENS, 6)
    all_of_them.note(SEED, TOKENS, 1)
    assert none.begin() is None
    assert all_of_them.begin() is None
