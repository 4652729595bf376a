"""Attention over the block pool by gathering: the path that every device and dtype has, and the others are held to.

Within one slice, with the new tokens already written to the pool (Kwon et al. 2023, section 4.3):

        0                      start            stop = context length
        |-- keys from earlier --|-- new keys ----|
                      |---------|------- query at position p sees keys 0 .. p, or with a window
                                         (Beltagy et al. 2020) only p - window + 1 .. p

Decodes of like length go together, in layers that see all and have no cap (`workers.decode_attention`). The rest
are attended to slice by slice, the plain path that the other one is held to. Three cases, cheapest first: a single
query sees everything and needs no mask, and its query heads are laid beside each other as rows of their shared KV
head (Ainslie et al. 2023, GQA), so nothing is repeated; a slice from position 0 has its keys in hand and reads
nothing back; the rest gathers the context, or of it the blocks that its first query's window begins in and all
after them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.batch import Batch
from workers.decode_attention import DecodeGroup, attend_group, group_decodes, plan_group
from workers.page_plan import batch_rows, block_rows, of_both
from workers.paged_kv import PagedKV

if TYPE_CHECKING:
    from workers.attention import Rule
    from workers.batch import Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class SlicePlan:
    """One slice's place in the flat step and in the pool, for layers that see equally far.

    begin, end: its tokens in the flat row. context_rows: block rows of the keys and values it sees, or None if all
    of them are computed by this step. gathered_len: tokens to take from those rows; the first `unseen_len` of
    them only share a block with what is seen. mask: [end - begin, gathered_len - unseen_len] in the model's
    dtype, 0 or -inf; None where every query sees all, or plainly all before it.
    """

    begin: int
    end: int
    context_rows: torch.Tensor | None
    gathered_len: int
    unseen_len: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Who is attended to together, and who one by one: each slice of the batch is in one of the two."""

    groups: tuple[DecodeGroup, ...]
    slices: tuple[SlicePlan, ...]

    @property
    def is_one_group(self) -> bool:
        """Whether the step is a single group, and nothing else; members of a group are in the batch's order."""
        return len(self.groups) == 1 and not self.slices


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherStep:
    """The `Step` that gathers: what the layers of a pass need to know, computed once for all that see equally far."""

    batch: Batch
    kv: PagedKV
    new_rows: torch.Tensor
    _plans: dict[tuple[int | None, bool], LayerPlan] = field(default_factory=dict)

    def for_layer(self, window: int | None, *, with_masks: bool) -> LayerPlan:
        """The slices as a layer with this window sees them; None, or one that no slice outgrows, is no window.

        with_masks: one by one, and spell out as a mask even the plain causal one of a slice from position 0.
        """
        longest = max(piece.start + len(piece.token_ids) for piece in self.batch)
        wanted = (window if window is not None and window < longest else None, with_masks)
        if wanted not in self._plans:
            self._plans[wanted] = self._plan(*wanted)
        return self._plans[wanted]

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        layer_plan = self.for_layer(rule.window, with_masks=rule.softcap is not None)
        if layer_plan.is_one_group:
            return attend_group(query[0], layer, self.kv, layer_plan.groups[0], rule.scaling)
        output = query.new_empty(query.shape[2], query.shape[1], values.shape[2])
        for group in layer_plan.groups:
            picked = query[0].index_select(1, group.places)
            output.index_copy_(0, group.places, attend_group(picked, layer, self.kv, group, rule.scaling))
        for plan in layer_plan.slices:
            context = _context(self.kv, layer, keys, values, plan)
            attended = _attend(query[:, :, plan.begin : plan.end], *context, plan.mask, rule.scaling, rule.softcap)
            output[plan.begin : plan.end] = attended[0].transpose(0, 1)
        return output

    def _plan(self, window: int | None, with_masks: bool) -> LayerPlan:
        batch, kv = self.batch, self.kv
        ends = list(accumulate(len(piece.token_ids) for piece in batch))
        groups = [] if with_masks or window is not None else group_decodes(batch, kv)
        grouped = set(chain.from_iterable(groups))
        return LayerPlan(
            groups=tuple(plan_group([batch[i] for i in group], [ends[i] - 1 for i in group], kv) for group in groups),
            slices=tuple(
                _plan_slice(piece, ends[i] - len(piece.token_ids), kv, window, with_masks)
                for i, piece in enumerate(batch)
                if i not in grouped
            ),
        )


def plan_gather(batch: Batch, kv: PagedKV) -> GatherStep:
    """Lay the slices of a step end to end and find their blocks, whose ends are zeroed. Index tensors are on the pool's
    device."""
    kv.clear_ends(batch)
    return GatherStep(batch=batch, kv=kv, new_rows=batch_rows(kv.plan, batch, kv.device))


def _plan_slice(piece: Slice, begin: int, kv: PagedKV, window: int | None, with_masks: bool) -> SlicePlan:
    num_tokens = len(piece.token_ids)
    stop = piece.start + num_tokens
    from_pool = piece.start > 0
    first_seen = 0 if window is None else max(0, piece.start - window + 1)
    first_block = first_seen // kv.plan.block_size
    gathered_len = stop - first_block * kv.plan.block_size
    rows = None
    if from_pool:
        of_keys = block_rows(kv.plan, piece.block_table[first_block:], gathered_len, kv.device)
        rows = of_both(of_keys, kv.plan.num_block_rows)
    is_plain = not from_pool and (window is None or stop <= window) and not with_masks
    return SlicePlan(
        begin=begin,
        end=begin + num_tokens,
        context_rows=rows,
        gathered_len=gathered_len,
        unseen_len=first_seen - first_block * kv.plan.block_size,
        mask=None if num_tokens == 1 or is_plain else _mask(num_tokens, stop - first_seen, window, kv),
    )


def _mask(num_tokens: int, context_len: int, window: int | None, kv: PagedKV) -> torch.Tensor:
    """Causal mask, within a window if there is one, for the last `num_tokens` of `context_len` positions."""
    before = context_len - num_tokens
    hidden = torch.full((num_tokens, context_len), float("-inf"), dtype=kv.compute_dtype, device=kv.device)
    mask = hidden.triu(before + 1)
    return mask if window is None else mask + hidden.tril(before - window)


def _context(
    kv: PagedKV, layer: int, keys: torch.Tensor, values: torch.Tensor, plan: SlicePlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys and values that the slice sees: [1, num_kv_heads, gathered_len - unseen_len, head_dim] each.

    keys, values: the new ones of the whole step, as the pool gives them back.
    """
    if plan.context_rows is None:
        return keys[None, :, plan.begin : plan.end], values[None, :, plan.begin : plan.end]
    shape = (1, kv.plan.num_kv_heads, -1, kv.plan.head_dim)
    gathered = kv.borrow(layer, plan.context_rows)
    seen_keys, seen_values = (states.view(shape)[:, :, plan.unseen_len : plan.gathered_len] for states in gathered)
    return seen_keys, seen_values


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """[1, num_heads, num_tokens, head_dim] for one slice."""
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    if softcap is not None:
        return _attend_capped(query, keys, values, mask, scaling, softcap)
    if num_tokens == 1:
        rows = query.reshape(1, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return scaled_dot_product_attention(rows, keys, values, scale=scaling).reshape(query.shape)
    return scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=num_heads != num_kv_heads,
    )


def _attend_capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attention with scores bent to `softcap * tanh(score / softcap)` (Bello et al. 2016, logit clipping).

    torch's fused kernels cannot do that; the order of rounding is that of transformers' Gemma 2.
    """
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = keys.shape[1]
    rows = query.reshape(1, num_kv_heads, num_heads // num_kv_heads * num_tokens, head_dim)
    scores = torch.tanh(rows @ keys.transpose(-1, -2) * scaling / softcap) * softcap
    if mask is not None:
        scores.view(1, num_kv_heads, -1, num_tokens, keys.shape[2]).add_(mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ values).reshape(query.shape)
