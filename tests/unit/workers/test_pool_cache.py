from __future__ import annotations

import pytest
import torch

from workers.batch import BlockId, Slice
from workers.page_plan import plan_pages
from workers.paged_kv import PagedKV
from workers.pool_cache import PoolCache

HEADS, HEAD_DIM, BLOCK_SIZE = 2, 3, 4
LAYER = 1


@pytest.fixture
def kv() -> PagedKV:
    plan = plan_pages(
        memory_bytes=1 << 14, num_layers=2, num_kv_heads=HEADS, head_dim=HEAD_DIM, block_size=BLOCK_SIZE, itemsize=4
    )
    return PagedKV(plan, torch.float32, torch.device("cpu"))


def slice_of(start: int, num_tokens: int, *blocks: int) -> Slice:
    table = [BlockId(block) for block in blocks]
    return Slice(token_ids=[0] * num_tokens, start=start, block_table=table, wants_logits=True)


def test_contexts_of_different_length_end_together_after_zeros(kv: PagedKV) -> None:
    batch = [slice_of(5, 2, 9, 3), slice_of(0, 2, 6)]
    for tensor in (*kv.keys, *kv.values):
        tensor.fill_(torch.nan)
    old = torch.randn(2, 5, HEADS, HEAD_DIM)
    kv.write(LAYER, batch[0].block_table, 0, *old)
    keys, values = torch.randn(2, 2, HEADS, 2, HEAD_DIM)
    cache = PoolCache(batch, kv)
    for contexts, new, before in zip(cache.update(keys, values, LAYER), (keys, values), old, strict=True):
        assert torch.equal(contexts[0], torch.cat([before.transpose(0, 1), new[0]], dim=1))
        assert torch.equal(contexts[1], torch.cat([torch.zeros(HEADS, 5, HEAD_DIM), new[1]], dim=1))
    assert cache.attention_mask is not None
    assert cache.attention_mask.tolist() == [[1] * 7, [0] * 5 + [1] * 2]
    assert cache.position_ids.tolist() == [[5, 6], [0, 1]]
    assert (cache.get_seq_length(), cache.get_mask_sizes(2, 0)) == (5, (7, 0))


def test_new_keys_and_values_are_in_the_pool_afterwards_and_in_no_other_layer(kv: PagedKV) -> None:
    batch = [slice_of(5, 2, 9, 3), slice_of(3, 2, 6, 1)]
    keys, values = torch.randn(2, 2, HEADS, 2, HEAD_DIM)
    PoolCache(batch, kv).update(keys, values, LAYER)
    for row, piece in enumerate(batch):
        read_keys, read_values = kv.read(LAYER, piece.block_table, piece.start, piece.start + 2)
        assert torch.equal(read_keys, keys[row].transpose(0, 1))
        assert torch.equal(read_values, values[row].transpose(0, 1))
    assert not kv.keys[0].any()
    assert int((kv.keys[LAYER] != 0).sum()) == keys.numel()


def test_contexts_of_one_length_need_no_mask(kv: PagedKV) -> None:
    assert PoolCache([slice_of(5, 1, 9, 3), slice_of(5, 1, 6, 1)], kv).attention_mask is None
