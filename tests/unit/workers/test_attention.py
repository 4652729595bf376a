from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.attention import paged_attention
from workers.batch import BlockId, Slice
from workers.decode_attention import GROUP_BYTES, group_decodes
from workers.gather_attention import plan_gather
from workers.page_plan import plan_pages
from workers.paged_kv import PagedKV

BLOCKS, BLOCK_SIZE, HEAD_DIM = 40, 4, 8
CPU = torch.device("cpu")


class Layer(torch.nn.Module):
    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx


@dataclass(frozen=True)
class Rule:
    """What a layer asks for: how many keys a query sees, and the bound of a score."""

    window: int | None = None
    softcap: float | None = None


def reference_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scaling: float, rule: Rule
) -> torch.Tensor:
    """Attention by its definition, one query and one head at a time.

    query: [num_tokens, num_heads, head_dim]; keys, values: [context_len, num_kv_heads, head_dim].
    """
    output = torch.zeros_like(query)
    group = query.shape[1] // keys.shape[1]
    for token in range(query.shape[0]):
        position = start + token
        seen = range(0 if rule.window is None else max(0, position - rule.window + 1), position + 1)
        for head in range(query.shape[1]):
            scores = [float(query[token, head] @ keys[key, head // group]) * scaling for key in seen]
            if rule.softcap is not None:
                scores = [rule.softcap * math.tanh(score / rule.softcap) for score in scores]
            highest = max(scores)
            weights = [math.exp(score - highest) for score in scores]
            for key, weight in zip(seen, weights, strict=True):
                output[token, head] += weight / sum(weights) * values[key, head // group]
    return output


def make_kv(num_kv_heads: int, num_layers: int = 2) -> PagedKV:
    block_bytes = 2 * num_layers * num_kv_heads * BLOCK_SIZE * HEAD_DIM * 4
    plan = plan_pages(
        memory_bytes=BLOCKS * block_bytes,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        block_size=BLOCK_SIZE,
        itemsize=4,
    )
    return PagedKV(plan, torch.float32, CPU)


def attend(
    kv: PagedKV,
    batch: list[Slice],
    states: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    rule: Rule = Rule(),
) -> torch.Tensor:
    """Run one layer over the batch; `states`: each slice's query, keys, values, `[num_tokens, heads, head_dim]`."""
    query, key, value = (torch.cat(parts).transpose(0, 1).unsqueeze(0) for parts in zip(*states, strict=True))
    output, weights = paged_attention(
        Layer(1),
        query,
        key,
        value,
        None,
        scaling=0.3,
        paged_step=plan_gather(batch, kv),
        sliding_window=rule.window,
        softcap=rule.softcap,
        dropout=0.0,
    )
    assert weights is None
    return output[0]


rules = st.builds(Rule, window=st.none() | st.integers(1, 30), softcap=st.none() | st.sampled_from([0.5, 30.0]))
slices = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)), min_size=1, max_size=4)


@given(slices, st.sampled_from([(4, 4), (4, 2), (6, 1)]), rules, st.integers(0, 1000))
def test_every_slice_of_any_batch_gets_what_the_definition_says(
    shapes: list[tuple[int, int]], heads: tuple[int, int], rule: Rule, seed: int
) -> None:
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    kv = make_kv(num_kv_heads)
    blocks = iter(random.Random(seed).sample(range(BLOCKS), BLOCKS))
    batch, states, expected = [], [], []
    for start, num_tokens in shapes:
        stop = start + num_tokens
        table = [BlockId(next(blocks)) for _ in range(-(-stop // BLOCK_SIZE))]
        keys, values = torch.randn(2, stop, num_kv_heads, HEAD_DIM)
        query = torch.randn(num_tokens, num_heads, HEAD_DIM)
        kv.write(1, table, 0, keys[:start], values[:start])
        batch.append(Slice(token_ids=[0] * num_tokens, start=start, block_table=table, wants_logits=True))
        states.append((query, keys[start:], values[start:]))
        expected.append(reference_attention(query, keys, values, start, 0.3, rule))
    torch.testing.assert_close(attend(kv, batch, states, rule), torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_new_keys_and_values_land_in_their_own_layer_at_their_positions() -> None:
    kv, table = make_kv(2), [BlockId(9), BlockId(4)]
    keys, values = torch.randn(2, 3, 2, HEAD_DIM)
    batch = [Slice(token_ids=[0, 0, 0], start=2, block_table=table, wants_logits=False)]
    attend(kv, batch, [(torch.randn(3, 4, HEAD_DIM), keys, values)])
    read_keys, read_values = kv.read(1, table, 2, 5)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)
    assert not kv.keys[0].any()
    assert int((kv.keys[1] != 0).sum()) == keys.numel()


@pytest.mark.parametrize("rule", [Rule(), Rule(window=3), Rule(softcap=1.0), Rule(window=3, softcap=1.0)])
@pytest.mark.parametrize("start", [0, 5])
def test_stale_contents_after_the_context_are_never_seen(start: int, rule: Rule) -> None:
    """A block's unused end holds what its last owner left there; a NaN would spread to every output."""
    kv, table = make_kv(2), [BlockId(3), BlockId(8), BlockId(1)]
    for tensor in (*kv.keys, *kv.values):
        tensor.fill_(math.nan)
    context = torch.randn(2, start, 2, HEAD_DIM)
    kv.write(1, table, 0, *context)
    for num_tokens in (1, 4):
        states = [torch.randn(num_tokens, heads, HEAD_DIM) for heads in (4, 2, 2)]
        batch = [Slice(token_ids=[0] * num_tokens, start=start, block_table=table, wants_logits=True)]
        assert attend(kv, batch, [(states[0], states[1], states[2])], rule).isfinite().all()


def test_layers_that_see_equally_far_share_one_plan_and_a_window_none_outgrows_is_no_window() -> None:
    kv, table = make_kv(2), [BlockId(9), BlockId(4), BlockId(7)]
    step = plan_gather([Slice(token_ids=[0] * 4, start=5, block_table=table, wants_logits=True)], kv)
    full = step.for_layer(None, with_masks=False)
    assert step.for_layer(9, with_masks=False) is full
    assert step.for_layer(8, with_masks=False) is not full


def test_blocks_that_a_window_has_left_behind_are_not_read() -> None:
    """Their contents do not matter, not even a NaN; the window begins in the middle of the third block."""
    kv, table = make_kv(2), [BlockId(block) for block in (3, 8, 1, 6)]
    kv.write(1, table, 0, *torch.randn(2, 14, 2, HEAD_DIM))
    kv.keys[1][[3, 8]] = math.nan
    kv.values[1][[3, 8]] = math.nan
    states = (torch.randn(2, 4, HEAD_DIM), *torch.randn(2, 2, 2, HEAD_DIM))
    batch = [Slice(token_ids=[0, 0], start=12, block_table=table, wants_logits=True)]
    assert attend(kv, batch, [states], Rule(window=4)).isfinite().all()
    assert not attend(kv, batch, [states], Rule(window=6)).isfinite().all()


# --- decodes that are attended to together ---


def decode(start: int, table: list[BlockId]) -> Slice:
    return Slice(token_ids=[0], start=start, block_table=table, wants_logits=True)


def tables_for(starts: list[int], seed: int = 0) -> list[list[BlockId]]:
    blocks = iter(random.Random(seed).sample(range(BLOCKS), BLOCKS))
    return [[BlockId(next(blocks)) for _ in range(start // BLOCK_SIZE + 1)] for start in starts]


def random_states(
    num_tokens: int, num_heads: int, num_kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, num_tokens, num_kv_heads, HEAD_DIM)
    return torch.randn(num_tokens, num_heads, HEAD_DIM), keys, values


@given(st.lists(st.integers(1, 15), min_size=2, max_size=9), st.sampled_from([(4, 4), (6, 2)]), st.integers(0, 99))
def test_decodes_together_get_what_each_gets_alone(starts: list[int], heads: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    kv = make_kv(num_kv_heads)
    for tensor in (*kv.keys, *kv.values):
        tensor.fill_(random.Random(seed).choice([math.nan, math.inf, 3e38]))  # what a last owner may leave behind
    batch = [decode(start, table) for start, table in zip(starts, tables_for(starts, seed), strict=True)]
    states = [random_states(1, num_heads, num_kv_heads) for _ in batch]
    for piece in batch:
        kv.write(1, piece.block_table, 0, *torch.randn(2, piece.start, num_kv_heads, HEAD_DIM).unbind())
    together = attend(kv, batch, states)
    apart = torch.cat([attend(kv, [piece], [state]) for piece, state in zip(batch, states, strict=True)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_decodes_of_like_length_are_grouped_and_prefills_and_odd_ones_are_not() -> None:
    kv = make_kv(2)
    bytes_of_token = 2 * 2 * HEAD_DIM * 4
    too_long = GROUP_BYTES // 2 // bytes_of_token  # with the new token more than half of what a group may have
    starts = [2, 40, 41, 35, 17, 16, too_long, too_long]
    batch = [decode(start, [BlockId(0)] * (start // BLOCK_SIZE + 1)) for start in starts]
    batch.append(Slice(token_ids=[0, 0], start=40, block_table=[BlockId(0)] * 11, wants_logits=True))
    batch.append(Slice(token_ids=[0], start=0, block_table=[BlockId(0)], wants_logits=True))
    assert [sorted(group) for group in group_decodes(batch, kv)] == [[1, 2, 3], [4, 5]]


def test_a_group_is_no_larger_than_its_memory_allows() -> None:
    kv = make_kv(2)
    length = 64 * BLOCK_SIZE
    most = GROUP_BYTES // (2 * 2 * length * HEAD_DIM * 4)
    batch = [decode(length - 1, [BlockId(0)] * 64) for _ in range(2 * most + 2)]
    assert [len(group) for group in group_decodes(batch, kv)] == [most, most, 2]


def test_decodes_with_a_prefill_between_them_land_in_their_own_places() -> None:
    kv = make_kv(2)
    first, middle, last = tables_for([9, 7, 10])
    for table, length in ((first, 9), (middle, 4), (last, 10)):
        kv.write(1, table, 0, *torch.randn(2, length, 2, HEAD_DIM).unbind())
    batch = [
        decode(9, first),
        Slice(token_ids=[0, 0, 0], start=4, block_table=middle, wants_logits=True),
        decode(10, last),
    ]
    states = [random_states(len(piece.token_ids), 4, 2) for piece in batch]
    assert len(group_decodes(batch, kv)) == 1
    apart = torch.cat([attend(kv, [piece], [state]) for piece, state in zip(batch, states, strict=True)])
    torch.testing.assert_close(attend(kv, batch, states), apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [Rule(window=4), Rule(softcap=1.0), Rule(window=4, softcap=1.0)])
def test_layers_with_a_rule_of_their_own_see_decodes_by_it(rule: Rule) -> None:
    kv, starts = make_kv(2), [9, 10, 11]
    batch, states, expected = [], [], []
    for start, table in zip(starts, tables_for(starts), strict=True):
        keys, values = torch.randn(2, start + 1, 2, HEAD_DIM)
        query = torch.randn(1, 4, HEAD_DIM)
        kv.write(1, table, 0, keys[:start], values[:start])
        batch.append(decode(start, table))
        states.append((query, keys[start:], values[start:]))
        expected.append(reference_attention(query, keys, values, start, 0.3, rule))
    torch.testing.assert_close(attend(kv, batch, states, rule), torch.cat(expected), atol=1e-5, rtol=1e-5)
