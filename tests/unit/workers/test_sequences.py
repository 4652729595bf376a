"""The sequence table: what is retained under a name, what is reused of it, and what is never written into."""

from __future__ import annotations

import math

import pytest

from bus.errors import Conflict, NotFound
from kvcache.hashing import HashSeed, block_digests
from workers.hits import MAX_SALTS, TOP_SALTS, HitTable
from workers.keys import SequenceKey
from workers.prefix_cache import PrefixCache
from workers.sequences import Sequence, SequenceTable

SEED = HashSeed(model="m", dtype="float32", block_size=4)
OTHER_SEED = HashSeed(model="m", dtype="float32", block_size=4, cache_salt="other")
S, T, U = (SequenceKey("tenant", name) for name in "stu")


def tokens(start: int, stop: int) -> list[int]:
    return list(range(start, stop))


def run(table: SequenceTable, ids: list[int], key: SequenceKey | None = None, seed: HashSeed = SEED) -> Sequence:
    """Begin, admit and compute everything. Fails the test if there is no room."""
    sequence = Sequence(seed, list(ids), key)
    table.begin(sequence)
    assert table.admit(sequence, -(-len(ids) // 4), now=0.0) is not None
    table.copied(sequence)
    table.advance(sequence, len(ids))
    table.check()
    return sequence


def keep(table: SequenceTable, ids: list[int], key: SequenceKey, seed: HashSeed = SEED) -> Sequence:
    sequence = run(table, ids, key, seed)
    table.end(sequence)
    table.check()
    return sequence


def reused(table: SequenceTable, ids: list[int], key: SequenceKey | None, seed: HashSeed = SEED) -> int | None:
    """Tokens that a new sequence need not compute."""
    sequence = Sequence(seed, list(ids), key)
    table.begin(sequence)
    num = table.admit(sequence, -(-len(ids) // 4), now=0.0)
    table.check()
    table.copied(sequence)
    table.end(sequence)
    table.check()
    return num


@pytest.fixture
def table() -> SequenceTable:
    return SequenceTable(PrefixCache(8, 4))


def test_digests_of_a_growing_sequence_equal_those_of_the_whole() -> None:
    sequence = Sequence(SEED, [1, 2])
    for token in range(3, 14):
        sequence.append(token)
    assert tuple(sequence.digests) == block_digests(SEED, tokens(1, 14))


def test_retained_sequence_keeps_its_partial_tail(table: SequenceTable) -> None:
    keep(table, tokens(0, 10), S)
    found = table.find(S)
    assert (found.num_computed, len(found.block_table), found.token_ids) == (10, 3, tokens(0, 10))
    assert table.cache.pool.counts().held == 3


def test_going_on_reuses_everything_with_the_partial_tail(table: SequenceTable) -> None:
    old = keep(table, tokens(0, 10), S)
    blocks = list(old.block_table)
    sequence = Sequence(SEED, tokens(0, 17), S)
    table.begin(sequence)
    assert table.admit(sequence, 5, now=0.0) == 10
    assert sequence.block_table[:3] == blocks
    assert table.find(S) is sequence
    table.advance(sequence, 17)
    table.end(sequence)
    assert table.find(S).num_computed == 17
    assert table.names() == [S]
    table.check()


def test_at_least_the_last_token_is_left_to_compute(table: SequenceTable) -> None:
    keep(table, tokens(0, 8), S)
    assert reused(table, tokens(0, 8), None) == 7, "four of one block, and a copy of three"
    assert reused(table, tokens(0, 9), None) == 8
    assert reused(table, tokens(0, 5), None) == 4
    assert reused(table, tokens(0, 8), S) == 7


def test_what_diverges_in_its_own_tail_block_is_reused_up_to_the_token(table: SequenceTable) -> None:
    keep(table, tokens(0, 10), S)
    assert reused(table, [*tokens(0, 9), 99, 98], S) == 9


def test_block_that_others_can_find_is_withdrawn_before_it_is_written_into(table: SequenceTable) -> None:
    keep(table, tokens(0, 8), S)
    assert reused(table, [*tokens(0, 6), 99, 98, 97], S) == 6
    assert reused(table, tokens(0, 9), None) == 4, "the second block no longer holds these tokens"


def test_block_that_goes_on_otherwise_is_copied_and_stays_as_it_is(table: SequenceTable) -> None:
    first = keep(table, tokens(0, 8), S)
    sequence = Sequence(SEED, [*tokens(0, 6), 99, 98, 97])
    table.begin(sequence)
    assert table.admit(sequence, 3, now=0.0) == 6
    assert sequence.copy == (first.block_table[1], sequence.block_table[1])
    assert sequence.block_table[0] == first.block_table[0]
    assert sequence.block_table[1] != first.block_table[1]
    assert table.copied_tokens == 2
    table.copied(sequence)
    table.advance(sequence, 9)
    table.end(sequence)
    assert reused(table, tokens(0, 9), None) == 8
    assert reused(table, [*tokens(0, 6), 99, 98, 97], None) == 8


def test_first_block_is_copied_too_but_never_one_of_another_salt(table: SequenceTable) -> None:
    keep(table, tokens(0, 8), S)
    assert reused(table, [0, 1, 77], None) == 2
    assert reused(table, [0, 1, 77], None, OTHER_SEED) == 0


def test_copy_that_was_never_made_leaves_nothing_under_the_name(table: SequenceTable) -> None:
    keep(table, tokens(0, 8), S)
    sequence = Sequence(SEED, [*tokens(0, 6), 99], T)
    table.begin(sequence)
    assert table.admit(sequence, 2, now=0.0) == 6
    table.end(sequence)
    assert table.find(T).num_computed == 4
    assert table.find(T).token_ids == tokens(0, 4)
    table.check()


def test_copy_is_given_up_when_another_has_computed_the_block(table: SequenceTable) -> None:
    keep(table, tokens(0, 8), S)
    ids = [*tokens(0, 6), 99, 98, 97]
    first, second = Sequence(SEED, ids), Sequence(SEED, ids)
    for sequence in (first, second):
        table.begin(sequence)
        assert table.admit(sequence, 3, now=0.0) == 6
    table.copied(first)
    table.advance(first, 8)
    assert table.catch_up(second) == 2
    assert second.copy is None
    table.check()


def test_hits_are_told_by_tenant_and_salt_without_giving_the_salt_away(table: SequenceTable) -> None:
    run(table, tokens(0, 6))
    run(table, tokens(0, 6))
    run(table, tokens(0, 9), seed=HashSeed(model="m", dtype="float32", block_size=4, tenant="t", cache_salt="secret"))
    plain, salted = table.hits.top()
    assert (plain.tenant, plain.salt, plain.lookup_tokens, plain.hit_tokens) == ("", "", 12, 4)
    assert (salted.tenant, salted.lookup_tokens, salted.hit_tokens) == ("t", 9, 0)
    assert salted.salt
    assert "secret" not in repr(table.hits.top())


def test_table_of_salts_is_bounded_and_its_totals_are_not() -> None:
    hits = HitTable()
    for number in range(3 * MAX_SALTS):
        seed = HashSeed(model="m", dtype="float32", block_size=4, cache_salt=str(number))
        hits.count(seed, lookup_tokens=number)
    assert len(hits.top()) == TOP_SALTS
    assert hits.top()[0].lookup_tokens == 3 * MAX_SALTS - 1
    assert hits.lookup_tokens == sum(range(3 * MAX_SALTS))


def test_block_that_another_sequence_holds_is_never_taken_over_in_part(table: SequenceTable) -> None:
    keep(table, tokens(0, 8), S)
    other = run(table, tokens(0, 9), T)
    shared = other.block_table[1]
    assert reused(table, [*tokens(0, 6), 99, 98, 97], S) == 6
    assert other.block_table[1] == shared
    assert table.cache.pool.ref_count(shared) == 1


def test_block_that_others_build_on_is_never_taken_over_in_part(table: SequenceTable) -> None:
    keep(table, tokens(0, 12), S)
    assert reused(table, [*tokens(0, 6), 99, 98, 97], S) == 6
    assert reused(table, tokens(0, 13), None) == 12


def test_other_seed_reuses_nothing_of_the_same_name(table: SequenceTable) -> None:
    keep(table, tokens(0, 10), S)
    assert reused(table, tokens(0, 12), S, OTHER_SEED) == 0


def test_other_name_shares_the_full_blocks_only(table: SequenceTable) -> None:
    keep(table, tokens(0, 10), S)
    assert reused(table, tokens(0, 12), T) == 8
    assert reused(table, tokens(0, 12), SequenceKey("other tenant", "s")) == 8


def test_longer_prefix_of_another_sequence_beats_the_retained_one(table: SequenceTable) -> None:
    keep(table, tokens(0, 6), S)
    keep(table, tokens(0, 12), T)
    assert reused(table, tokens(0, 14), S) == 12
    assert table.find(S).num_computed == 12


def test_second_writer_gets_a_conflict_until_the_first_ends(table: SequenceTable) -> None:
    first = run(table, tokens(0, 6), S)
    with pytest.raises(Conflict, match="being generated") as caught:
        table.begin(Sequence(SEED, [1], S))
    assert caught.value.current_len == 6
    with pytest.raises(Conflict, match="cancel it first"):
        table.delete(S)
    table.end(first)
    table.begin(Sequence(SEED, [1], S))


def test_admission_without_room_changes_nothing(table: SequenceTable) -> None:
    held = run(table, tokens(100, 124))
    keep(table, tokens(0, 7), S)
    before = table.cache.pool.counts()
    for key in (S, None):
        sequence = Sequence(SEED, tokens(0, 20), key)
        table.begin(sequence)
        assert table.admit(sequence, 5, now=0.0) is None
        assert (sequence.block_table, sequence.num_computed) == ([], 0)
        table.end(sequence)
        after = table.cache.pool.counts()
        assert (after.free, after.held, after.cached) == (before.free, before.held, before.cached)
        assert table.find(S).num_computed == 7
        table.check()
    assert table.hits.lookup_tokens == 31
    table.end(held)


def test_what_it_will_not_reuse_makes_room_for_its_own_admission(table: SequenceTable) -> None:
    """All blocks are its own: the 16 tokens it goes on from stay, the others' blocks are needed at once."""
    keep(table, tokens(0, 32), S)
    assert reused(table, [*tokens(0, 16), *tokens(50, 66)], S) == 16


def test_retained_sequences_are_evicted_whole_least_recent_first(table: SequenceTable) -> None:
    for start, key in ((0, S), (100, T), (200, U)):
        keep(table, tokens(start, start + 6), key)
    table.use(S)
    table.find(T)  # only looked at
    long = run(table, tokens(300, 316))
    with pytest.raises(NotFound, match="may have been evicted"):
        table.find(T)
    assert table.names() == [S, U]
    assert table.evictions == 1
    table.end(long)


def test_full_blocks_of_an_evicted_sequence_can_still_be_found(table: SequenceTable) -> None:
    keep(table, tokens(0, 6), S)
    keep(table, tokens(100, 122), T)  # all 8 blocks are held now
    run(table, [500])
    assert table.names() == [T]
    assert reused(table, tokens(0, 8), None) == 4


def test_pinned_sequence_is_not_evicted_until_the_pin_expires_or_is_taken_off(table: SequenceTable) -> None:
    keep(table, tokens(0, 32), S)
    table.pin(S, expires_at=10.0)
    sequence = Sequence(SEED, [500])
    table.begin(sequence)
    assert table.admit(sequence, 1, now=9.9) is None
    table.pin(S, math.inf)
    assert table.admit(sequence, 1, now=1e9) is None
    assert table.is_pinned(S, 1e9)
    table.unpin(S)
    assert table.admit(sequence, 1, now=9.9) == 0
    table.check()
    with pytest.raises(NotFound):
        table.pin(S, math.inf)


def test_expired_pin_lets_it_be_evicted(table: SequenceTable) -> None:
    keep(table, tokens(0, 32), S)
    table.pin(S, expires_at=10.0)
    sequence = Sequence(SEED, [500])
    table.begin(sequence)
    assert table.admit(sequence, 1, now=10.0) == 0
    assert not table.is_pinned(S, 0.0)


def test_deleting_a_pinned_sequence_frees_its_blocks_and_its_pin(table: SequenceTable) -> None:
    keep(table, tokens(0, 6), S)
    table.pin(S, math.inf)
    table.delete(S)
    assert table.cache.pool.counts().held == 0
    assert not table.is_pinned(S, 0.0)
    with pytest.raises(NotFound):
        table.delete(S)
    table.check()


def test_pin_of_a_running_sequence_holds_after_its_end(table: SequenceTable) -> None:
    running = run(table, tokens(0, 6), S)
    table.pin(S, math.inf)
    table.end(running)
    assert table.is_pinned(S, 0.0)


def test_one_that_gives_up_its_blocks_leaves_its_name_what_it_had_from_it(table: SequenceTable) -> None:
    keep(table, tokens(0, 6), S)
    again = run(table, tokens(0, 11), S)
    table.give_up(again)
    table.check()
    assert (table.find(S).num_computed, table.find(S).token_ids) == (6, tokens(0, 6))
    assert table.admit(again, 3, now=0.0) == 8, "blocks that it filled meanwhile can be found"
    table.give_up(again)
    table.end(again)
    assert table.find(S).num_computed == 6
    table.check()


def test_one_that_gives_up_its_blocks_leaves_its_name_what_was_pinned_of_it(table: SequenceTable) -> None:
    running = run(table, tokens(0, 6), S)
    table.pin(S, expires_at=10.0)
    for token in tokens(6, 11):
        running.append(token)
    assert table.grow(running, 11, now=0.0)
    table.advance(running, 11)
    assert table.to_give_up(running, now=0.0) == running.block_table[2:]
    assert table.to_give_up(running, now=10.0) == running.block_table, "the pin is over"
    table.give_up(running)
    table.end(running)
    assert table.is_pinned(S, 0.0)
    assert table.find(S).num_computed == 6
    table.check()


def test_one_that_gives_up_its_blocks_and_had_none_from_its_name_leaves_that_as_it_is(table: SequenceTable) -> None:
    keep(table, tokens(0, 6), S)
    other = run(table, tokens(50, 60), S)
    table.give_up(other)
    assert table.find(S).token_ids == tokens(0, 6)
    table.end(other)
    assert table.find(S).token_ids == tokens(0, 6)
    table.check()


def test_names_that_nobody_touched_are_not_looked_at_again(table: SequenceTable) -> None:
    keep(table, tokens(0, 6), S)
    running = run(table, tokens(100, 106), T)
    assert table.take_stirred() == {S, T}
    assert table.take_stirred() == {T}
    table.end(running)
    table.delete(S)
    assert table.take_stirred() == {S, T}
    assert (table.has(S), table.has(T), table.names()) == (False, True, [T])
    assert table.take_stirred() == set()


def test_shared_blocks_count_as_room_only_when_all_holders_can_be_evicted(table: SequenceTable) -> None:
    keep(table, tokens(0, 28), S)
    keep(table, tokens(0, 28), T)
    assert table.cache.pool.counts().held == 7
    table.pin(S, math.inf)
    assert reused(table, tokens(500, 505), None) is None
    assert table.names() == [S, T], "nothing is evicted when that would not be enough"
    table.unpin(S)
    assert reused(table, tokens(500, 505), None) == 0


def test_retained_sequence_is_gone_on_with_even_when_nothing_can_be_found(table: SequenceTable) -> None:
    keep(table, tokens(0, 8), S)
    table.cache.flush()
    assert reused(table, tokens(0, 9), T) == 0
    assert reused(table, tokens(0, 9), S) == 8


def test_growth_is_block_by_block_and_all_or_nothing(table: SequenceTable) -> None:
    sequence = run(table, tokens(0, 4))
    assert table.grow(sequence, 4, now=0.0)
    assert len(sequence.block_table) == 1
    assert table.grow(sequence, 5, now=0.0)
    assert len(sequence.block_table) == 2
    assert not table.grow(sequence, 33, now=0.0)
    assert len(sequence.block_table) == 2
    table.check()


def test_sequence_that_computed_nothing_leaves_what_was_kept_before(table: SequenceTable) -> None:
    keep(table, tokens(0, 6), S)
    sequence = Sequence(SEED, tokens(0, 8), S)
    table.begin(sequence)
    assert table.find(S).num_computed == 6
    table.end(sequence)
    assert table.find(S).num_computed == 6
