"""FlexAttention over the pool, uncompiled: the same masks and tables in plain torch, held to the gathering path."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.attention import Rule
from workers.attention_choice import attend
from workers.batch import Batch, BlockId, Slice
from workers.flex_attention import PIECE_ROWS, block_mask, plan_flex
from workers.gather_attention import plan_gather
from workers.page_plan import plan_pages
from workers.paged_kv import PagedKV

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

BLOCKS, BLOCK_SIZE, HEAD_DIM, LAYER = 48, 4, 8, 1


@pytest.fixture(scope="module", autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def make_kv(num_kv_heads: int) -> PagedKV:
    """A pool of what a former owner left: keys that are no numbers, values that are none either."""
    plan = plan_pages(
        memory_bytes=BLOCKS * 2 * 2 * num_kv_heads * BLOCK_SIZE * HEAD_DIM * 4,
        num_layers=2,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        block_size=BLOCK_SIZE,
        itemsize=4,
    )
    return PagedKV(plan, torch.float32, torch.device("cpu"))


def lay_out(kv: PagedKV, shapes: list[tuple[int, int]], seed: int, *, shared: int = 0) -> Batch:
    """Slices of (start, tokens) at random places of the pool, their contexts random, the first `shared` blocks one."""
    blocks = iter(random.Random(seed).sample(range(BLOCKS), BLOCKS))
    prefix = [BlockId(next(blocks)) for _ in range(shared)]
    batch = []
    for start, num_tokens in shapes:
        table = [*prefix, *(BlockId(next(blocks)) for _ in range(-(-(start + num_tokens) // BLOCK_SIZE) - shared))]
        for states in (kv.keys[LAYER], kv.values[LAYER]):
            states[table[-1]] = math.nan  # what a former owner left behind
        kv.write(LAYER, table, 0, *torch.randn(2, start, kv.plan.num_kv_heads, HEAD_DIM))
        batch.append(Slice(token_ids=[0] * num_tokens, start=start, block_table=table, wants_logits=True))
    return batch


def assert_same(kv: PagedKV, batch: Batch, group: int, rule: Rule) -> None:
    num_tokens = sum(len(piece.token_ids) for piece in batch)
    query = torch.randn(1, group * kv.plan.num_kv_heads, num_tokens, HEAD_DIM)
    states = (query, *torch.randn(2, 1, kv.plan.num_kv_heads, num_tokens, HEAD_DIM))
    attended, expected = (
        attend(plan, batch, kv, LAYER, states, rule) for plan in (partial(plan_flex, group=group), plan_gather)
    )
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-5)


slices = st.lists(st.tuples(st.integers(0, 20), st.sampled_from([1, 1, 2, 9])), min_size=1, max_size=5)
rules = st.builds(
    Rule, st.sampled_from([0.3, 1.0]), st.none() | st.integers(1, 30), st.none() | st.sampled_from([0.5, 30.0])
)


@settings(max_examples=15)
@given(slices, st.sampled_from([(1, 1), (2, 3), (3, 1), (1, 4)]), rules, st.integers(0, 1000))
def test_every_slice_of_any_batch_gets_what_gathering_gives(
    shapes: list[tuple[int, int]], heads: tuple[int, int], rule: Rule, seed: int
) -> None:
    torch.manual_seed(seed)
    kv = make_kv(heads[0])
    assert_same(kv, lay_out(kv, shapes, seed), heads[1], rule)


@pytest.mark.parametrize("window", [None, 5])
def test_slices_longer_than_a_piece_are_cut_and_the_last_piece_filled_up(window: int | None) -> None:
    kv, group = make_kv(1), 4
    longest = PIECE_ROWS // group
    assert_same(kv, lay_out(kv, [(3, 2 * longest + 5), (0, longest), (7, 1)], seed=1), group, Rule(0.3, window))


def test_sequences_that_share_their_first_blocks_each_see_them() -> None:
    kv = make_kv(2)
    assert_same(kv, lay_out(kv, [(9, 1), (13, 1), (8, 6)], seed=2, shared=2), 2, Rule(0.3))


def test_blocks_that_a_window_has_left_behind_are_not_in_the_kernels_table() -> None:
    """Uncompiled, the mask alone decides; the kernel reads what the table says."""
    kv, window = make_kv(2), 6
    batch = lay_out(kv, [(17, 1), (2, 1)], seed=3)
    (pieces,) = plan_flex(batch, kv, group=1).pieces
    mask = block_mask(pieces, kv, 1, window)
    long_table, short_table = (piece.block_table for piece in batch)
    assert mask.kv_num_blocks.flatten().tolist() == [2, 2, 1, 1], "positions 12 .. 17, and 0 .. 2, in two KV heads"
    read = [mask.kv_indices[row, 0, 0, : mask.kv_num_blocks[row, 0, 0]].tolist() for row in range(4)]
    assert read == [
        [2 * block + head for block in blocks] for blocks in (long_table[3:], short_table) for head in (0, 1)
    ]


def test_number_of_pieces_and_width_of_tables_take_few_values() -> None:
    """Each other one may cost a compilation."""
    kv = make_kv(1)
    for num_seqs, num_pieces in ((1, 2), (3, 4), (4, 4), (5, 8)):
        (pieces,) = plan_flex(lay_out(kv, [(9, 1)] * num_seqs, seed=4), kv, group=1).pieces
        assert (pieces.first.shape[0], pieces.block_tables.shape) == (num_pieces, (num_pieces, 4))
    (pieces,) = plan_flex(lay_out(kv, [(9, 1)], seed=4), kv, group=1, max_blocks=7).pieces
    assert pieces.block_tables.shape == (2, 7)
