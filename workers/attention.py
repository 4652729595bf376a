"""Attention over the block pool, plugged into transformers at its attention interface.

transformers' own model code computes queries, keys and values and calls `paged_attention` instead of its
cache and kernel. All tokens of a step's slices come in one flat row of the batch, `[1, heads, num_tokens,
head_dim]`; the step's plan, handed through the model as the keyword `paged_step`, says which are whose
and where each lies in the pool. No state is kept here between calls.

Within one slice, with the new tokens already written to the pool (Kwon et al. 2023, section 4.3):

        0                      start            stop = context length
        |-- keys from earlier --|-- new keys ----|
                                 query at position p sees keys 0 .. p

Three cases, cheapest first: a single query sees everything and needs no mask, and its query heads are
laid beside each other as rows of their shared KV head (Ainslie et al. 2023, GQA), so nothing is repeated;
a slice from position 0 has its keys in hand and reads nothing back; the rest gathers the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from workers.paged_kv import PagedKV, block_rows, gather_kv, token_rows, write_kv

if TYPE_CHECKING:
    from workers.batch import Batch, Slice

ATTENTION_NAME = "kvcache_paged"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """One slice's place in the flat step and in the pool.

    begin, end: its tokens in the flat row. context_len: keys its last token sees, itself among them.
    context_rows: block rows of those keys, or None if all of them are computed by this step.
    mask: [end - begin, context_len] in the model's dtype, 0 or -inf; None where none is needed.
    """

    begin: int
    end: int
    context_len: int
    context_rows: torch.Tensor | None
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What every layer of one forward pass needs to know, computed once for all of them."""

    kv: PagedKV
    new_rows: torch.Tensor
    slices: tuple[SlicePlan, ...]


def plan_step(batch: Batch, kv: PagedKV) -> StepPlan:
    """Lay the slices of a step end to end and find their blocks. Index tensors are on the pool's device."""
    plans: list[SlicePlan] = []
    per_head: list[torch.Tensor] = []
    begin = 0
    for piece in batch:
        stop = piece.start + len(piece.token_ids)
        rows = token_rows(kv.plan, piece.block_table, piece.start, stop, kv.device)
        per_head.append(rows.view(kv.plan.num_kv_heads, -1))
        plans.append(_plan_slice(piece, begin, kv))
        begin += len(piece.token_ids)
    return StepPlan(kv=kv, new_rows=torch.cat(per_head, dim=1).reshape(-1), slices=tuple(plans))


def _plan_slice(piece: Slice, begin: int, kv: PagedKV) -> SlicePlan:
    num_tokens = len(piece.token_ids)
    stop = piece.start + num_tokens
    from_pool = piece.start > 0
    return SlicePlan(
        begin=begin,
        end=begin + num_tokens,
        context_len=stop,
        context_rows=block_rows(kv.plan, piece.block_table, stop, kv.device) if from_pool else None,
        mask=_late_causal_mask(num_tokens, stop, kv) if from_pool and num_tokens > 1 else None,
    )


def _late_causal_mask(num_tokens: int, context_len: int, kv: PagedKV) -> torch.Tensor:
    """Causal mask for the last `num_tokens` of `context_len` positions, aligned at the lower right."""
    mask = torch.full((num_tokens, context_len), float("-inf"), dtype=kv.dtype, device=kv.device)
    return mask.triu_(context_len - num_tokens + 1)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged_step: StepPlan,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """One layer's attention for all slices of a step; writes their keys and values into the pool first.

    query: [1, num_heads, num_tokens, head_dim]; key, value: [1, num_kv_heads, num_tokens, head_dim].
    `module.layer_idx` names the layer; every mask is in the plan.
    Returns [1, num_tokens, num_heads, head_dim], and no weights.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    keys, values = paged_step.kv.keys[layer], paged_step.kv.values[layer]
    write_kv(keys, key[0], paged_step.new_rows)
    write_kv(values, value[0], paged_step.new_rows)
    outputs = [
        _attend(
            query[:, :, plan.begin : plan.end],
            _context(keys, key, plan),
            _context(values, value, plan),
            plan,
            scaling,
        )
        for plan in paged_step.slices
    ]
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    return joined.transpose(1, 2), None


def _context(cache: torch.Tensor, new: torch.Tensor, plan: SlicePlan) -> torch.Tensor:
    """All keys or values the slice sees: [1, num_kv_heads, context_len, head_dim]."""
    if plan.context_rows is None:
        return new[:, :, plan.begin : plan.end]
    return gather_kv(cache, plan.context_rows, plan.context_len).unsqueeze(0)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: SlicePlan, scaling: float
) -> torch.Tensor:
    """[1, num_heads, num_tokens, head_dim] for one slice."""
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    if num_tokens == 1:
        rows = query.reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return scaled_dot_product_attention(rows, keys, values, scale=scaling).reshape(query.shape)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=plan.mask,
        is_causal=plan.mask is None,
        scale=scaling,
        enable_gqa=num_heads != num_kv_heads,
    )


def register() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known to transformers; twice does no harm.

    No mask function goes with it, so that transformers builds none: the masks are in the plan.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
