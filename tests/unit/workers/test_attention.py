from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.attention import paged_attention, plan_step
from workers.batch import BlockId, Slice
from workers.paged_kv import PagedKV, plan_pages

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
        paged_step=plan_step(batch, kv),
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
    step = plan_step([Slice(token_ids=[0] * 4, start=5, block_table=table, wants_logits=True)], kv)
    full = step.slices(None, with_masks=False)
    assert step.slices(9, with_masks=False) is full
    assert step.slices(8, with_masks=False) is not full


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
