"""Loans of blocks: held while bytes travel, and never in the way of a sequence."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import NoSpace, NotFound
from kvcache.hashing import BlockHash, HashSeed, block_digests, encode_token_ids
from workers.batch import BlockId
from workers.keys import SequenceKey
from workers.loans import LoanId
from workers.prefix_cache import PrefixCache
from workers.sequences import Sequence, SequenceTable

SEED = HashSeed(model="m", dtype="float32", block_size=4)
LOAN, OTHER = LoanId(b"loan"), LoanId(b"other")
NAME = SequenceKey("tenant", "s")
NUM_BLOCKS = 8


def chain(num_blocks: int, first: int = 0) -> tuple[list[BlockHash], bytes, list[bytes]]:
    """Digests, all tokens, and the tokens of each block."""
    ids = list(range(first, first + 4 * num_blocks))
    tokens = encode_token_ids(ids)
    return list(block_digests(SEED, ids)), tokens, [tokens[at : at + 16] for at in range(0, len(tokens), 16)]


def compute(table: SequenceTable, num_blocks: int, first: int = 0, key: SequenceKey | None = None) -> Sequence:
    """Admit and compute a sequence of that many full blocks."""
    sequence = Sequence(SEED, list(range(first, first + 4 * num_blocks)), key)
    table.begin(sequence)
    assert table.admit(sequence, num_blocks, now=0.0) is not None
    table.advance(sequence, 4 * num_blocks)
    return sequence


def fill(table: SequenceTable, first: int, stop: int, written: list[BlockId]) -> int:
    digests, _, tokens = chain(stop)
    num = table.fill_loan(LOAN, digests[first:], tokens[first:], SEED, written.extend, now=0.0)
    table.check()
    return num


@pytest.fixture
def table() -> SequenceTable:
    return SequenceTable(PrefixCache(NUM_BLOCKS, 4))


def test_loan_holds_the_longest_run_that_is_there(table: SequenceTable) -> None:
    table.end(compute(table, 3))
    digests, tokens, _ = chain(5)
    assert table.loans.open(LOAN, digests, tokens) == 3
    table.check()
    assert table.cache.pool.counts().held == 3
    table.loans.end(LOAN)
    table.check()
    counts = table.cache.pool.counts()
    assert (counts.held, counts.cached) == (0, 3)


def test_blocks_that_were_filled_are_a_prefix_like_any_other(table: SequenceTable) -> None:
    digests, tokens, _ = chain(5)
    written: list[BlockId] = []
    assert table.loans.open(LOAN, digests, tokens) == 0
    assert [fill(table, 0, 2, written), fill(table, 2, 5, written)] == [2, 5]
    table.loans.end(LOAN)
    assert len(set(written)) == 5
    sequence = Sequence(SEED, list(range(21)))
    table.begin(sequence)
    assert table.admit(sequence, 6, now=0.0) == 20
    assert sequence.block_table[:5] == written


def test_block_that_was_computed_meanwhile_is_used_instead_of_the_copy(table: SequenceTable) -> None:
    digests, tokens, _ = chain(2)
    table.loans.open(LOAN, digests, tokens)
    computed = compute(table, 2)
    written: list[BlockId] = []
    assert fill(table, 0, 2, written) == 2
    assert list(table.loans.blocks(LOAN)) == computed.block_table
    assert not set(written) & set(computed.block_table)


def test_sequence_that_needs_room_takes_it_from_loans(table: SequenceTable) -> None:
    table.end(compute(table, 5))
    digests, tokens, _ = chain(5)
    table.loans.open(LOAN, digests, tokens)
    compute(table, NUM_BLOCKS, first=1000)
    table.check()
    with pytest.raises(NotFound):
        table.loans.blocks(LOAN)
    with pytest.raises(NotFound):
        fill(table, 5, 6, [])
    table.loans.end(LOAN)
    table.check()


def test_loans_go_before_a_sequence_that_a_client_named(table: SequenceTable) -> None:
    table.end(compute(table, 3, key=NAME))
    table.end(compute(table, 3, first=500))
    digests = block_digests(SEED, list(range(500, 512)))
    table.loans.open(LOAN, digests, encode_token_ids(list(range(500, 512))))
    compute(table, 5, first=1000)
    assert table.find(NAME).num_computed == 12
    assert LOAN not in table.loans


def test_fill_takes_the_room_of_named_sequences_and_of_nobody_else(table: SequenceTable) -> None:
    table.end(compute(table, 3, first=500, key=NAME))
    running = compute(table, 3, first=1000)
    digests, tokens, _ = chain(6)
    table.loans.open(LOAN, digests, tokens)
    assert fill(table, 0, 5, []) == 5
    with pytest.raises(NotFound):
        table.find(NAME)
    with pytest.raises(NoSpace):
        fill(table, 5, 6, [])
    table.check()
    assert len(running.block_table) == 3
    assert len(table.loans.blocks(LOAN)) == 5, "what it had stays"


def test_pinned_sequence_is_not_evicted_for_blocks_of_others(table: SequenceTable) -> None:
    table.end(compute(table, 5, first=500, key=NAME))
    table.pin(NAME, expires_at=10.0)
    digests, tokens, _ = chain(4)
    table.loans.open(LOAN, digests, tokens)
    with pytest.raises(NoSpace):
        fill(table, 0, 4, [])
    assert table.find(NAME).num_computed == 20


def test_fill_that_fails_changes_nothing(table: SequenceTable) -> None:
    digests, tokens, of_blocks = chain(2)
    table.loans.open(LOAN, digests, tokens)

    def fail(blocks: object) -> None:
        raise ValueError("no such bytes")

    with pytest.raises(ValueError, match="no such bytes"):
        table.fill_loan(LOAN, digests, of_blocks, SEED, fail, now=0.0)
    table.check()
    assert table.cache.pool.counts().free == NUM_BLOCKS
    assert list(table.loans.blocks(LOAN)) == []


@given(st.lists(st.tuples(st.sampled_from(["open", "fill", "end", "run", "stop"]), st.integers(0, 3)), max_size=40))
def test_every_block_is_accounted_for_whatever_happens(steps: list[tuple[str, int]]) -> None:
    table = SequenceTable(PrefixCache(NUM_BLOCKS, 4))
    running: dict[int, Sequence] = {}
    for what, which in steps:
        loan = LoanId(bytes([which]))
        digests, tokens, of_blocks = chain(4, first=100 * which)
        if what == "open" and loan not in table.loans:
            table.loans.open(loan, digests, tokens)
        elif what == "fill" and loan in table.loans and (at := len(table.loans.blocks(loan))) < 4:
            with suppress(NoSpace):
                table.fill_loan(loan, digests[at : at + 2], of_blocks[at : at + 2], SEED, lambda blocks: None, 0.0)
        elif what == "end":
            table.loans.end(loan)
        elif what == "run" and which not in running:
            sequence = Sequence(SEED, list(range(100 * which, 100 * which + 18)), SequenceKey("t", str(which)))
            table.begin(sequence)
            if table.admit(sequence, 5, now=0.0) is None:
                table.end(sequence)
            else:
                table.advance(sequence, 18)
                running[which] = sequence
        elif what == "stop" and which in running:
            table.end(running.pop(which))
        table.check()
