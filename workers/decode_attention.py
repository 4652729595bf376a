"""Attention of many single queries at once: decodes of like length, padded to the longest of them.

A step of 32 decodes would make 32 gathers and 32 kernel calls per layer. Here the blocks of a group are gathered
in one copy and attended to in one call with a mask:

    sequence 0   |== context ==================| stale |
    sequence 1   |== context ==========| stale |  pad  |      pad: its own first block again
                                                        padded to whole blocks of the longest

A masked key has no weight, but a weight of 0 times NaN is NaN, and a block's stale end holds whatever its last
owner left. So whoever plans a step has stale ends zeroed, and what is padded with is the sequence's own.

A group saves what it costs to call a kernel, which is much for short contexts and nothing for long ones. But what is
gathered must stay in the core's second-level cache until it is attended to (2 MiB here), or it goes to memory and
back. So a group has a limit in bytes, and decodes of long contexts are alone. Milliseconds per layer for 32 decodes
of SmolLM2-135M on one core, by the size of their groups:

    sequences in a group            1      2      4      8     16     32
    bfloat16, contexts of   128   1.17   0.77   0.55   0.53   0.61   0.66
                            256   1.93   1.45   1.32   1.50   1.49   1.77
                            512   3.14   2.83   2.73   2.83   2.99   3.55
                          1,024   6.29   6.59   6.52   6.97   7.47   8.30
    float32, contexts of    128   1.63   1.16   0.84   1.06   1.03   1.28
                          1,024   11.0   11.2   11.4   12.7   14.2   16.0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.page_plan import of_both

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.batch import Slice
    from workers.page_plan import PagePlan
    from workers.paged_kv import PagedKV

GROUP_BYTES = 1 << 20
"""Keys and values of one layer, padded, that a group may have."""

MIN_FILL = 0.75
"""The shortest context of a group has at least this share of the longest one's blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Decodes that are attended to together. Index tensors are int64, all tensors on the pool's device.

    places: [num_seqs], where their tokens are in the flat row.
    block_rows: [2 * num_seqs * num_kv_heads * padded_blocks], in this order; those of keys, then of values.
    mask: [num_seqs, 1, 1, padded_len] in the compute dtype, 0 or -inf.
    """

    places: torch.Tensor
    block_rows: torch.Tensor
    mask: torch.Tensor


def group_decodes(batch: Sequence[Slice], kv: PagedKV) -> list[list[int]]:
    """Indices in the batch, rising, of decodes that go together; those that are better off alone are in no group."""
    plan = kv.plan
    bytes_of_block = 2 * plan.num_kv_heads * plan.block_size * plan.head_dim * kv.compute_dtype.itemsize
    decodes = [i for i, piece in enumerate(batch) if len(piece.token_ids) == 1 and piece.start > 0]
    groups: list[list[int]] = []
    longest = 0
    for index in sorted(decodes, key=lambda index: -batch[index].start):
        num_blocks = _num_blocks(batch[index], plan)
        is_alike = num_blocks >= longest * MIN_FILL
        if groups and is_alike and (len(groups[-1]) + 1) * longest * bytes_of_block <= GROUP_BYTES:
            groups[-1].append(index)
        else:
            groups.append([index])
            longest = num_blocks
    return [sorted(group) for group in groups if len(group) > 1]


def plan_group(pieces: Sequence[Slice], places: Sequence[int], kv: PagedKV) -> DecodeGroup:
    """What all layers need to know of these decodes, whose tokens are at `places` in the flat row."""
    plan, heads = kv.plan, torch.arange(kv.plan.num_kv_heads)
    used = [_num_blocks(piece, plan) for piece in pieces]
    padded = max(used)
    padded_len = padded * plan.block_size
    tables = torch.tensor(
        [
            [*piece.block_table[:num], *[piece.block_table[0]] * (padded - num)]
            for piece, num in zip(pieces, used, strict=True)
        ]
    )
    rows = (tables[:, None, :] * plan.num_kv_heads + heads[None, :, None]).reshape(-1)
    positions = torch.arange(padded_len)[None, :]
    context_lens = torch.tensor([piece.start + 1 for piece in pieces])[:, None]
    mask = torch.zeros(len(pieces), padded_len, dtype=kv.compute_dtype)
    mask.masked_fill_(positions >= context_lens, float("-inf"))
    return DecodeGroup(
        places=torch.tensor(places, device=kv.device),
        block_rows=of_both(rows, plan.num_block_rows).to(kv.device),
        mask=mask[:, None, None, :].to(kv.device),
    )


def attend_group(query: torch.Tensor, layer: int, kv: PagedKV, group: DecodeGroup, scaling: float) -> torch.Tensor:
    """One layer's attention for a group, whose new keys and values are in the pool already.

    query: [num_heads, num_seqs, head_dim], of the group's tokens.
    Returns [num_seqs, num_heads, head_dim].
    """
    num_seqs, num_kv_heads, head_dim = len(group.places), kv.plan.num_kv_heads, kv.plan.head_dim
    # As in the attention of one: the query heads of a KV head are its rows, so nothing is repeated.
    rows = query.transpose(0, 1).reshape(num_seqs, num_kv_heads, -1, head_dim)
    keys, values = kv.borrow(layer, group.block_rows)
    output = scaled_dot_product_attention(
        rows,
        keys.view(num_seqs, num_kv_heads, -1, head_dim),
        values.view(num_seqs, num_kv_heads, -1, head_dim),
        attn_mask=group.mask,
        scale=scaling,
    )
    return output.reshape(num_seqs, -1, head_dim)


def _num_blocks(piece: Slice, plan: PagePlan) -> int:
    """Blocks of the context, the new token among it."""
    return piece.start // plan.block_size + 1
