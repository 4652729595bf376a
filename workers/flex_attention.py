"""Attention over the block pool in one kernel: torch's FlexAttention (Dong et al. 2024), its block mask our tables.

Nothing is gathered. One layer's keys are seen as one long row of block rows (`workers.page_plan`), and the mask of a
piece names those of its sequence's blocks, in its KV head:

    keys, values   [1, 1, num_blocks * num_kv_heads * block_size, head_dim]      the pool, as it lies
    queries        [num_pieces * num_kv_heads, 1, piece_len * group, head_dim]   those of a KV head side by side

A decode is a piece of one token; longer slices are cut into pieces of `PIECE_ROWS` rows, the last filled up. The number
of pieces is rounded up to a power of two, so that the kernel is compiled for few shapes; a piece that is none sees no
block and costs nothing.

It must be compiled: as plain torch it would compute the scores of the whole pool, which only a test's can bear. A
masked key has no weight, but 0 times NaN is NaN: so planning a step zeroes the ends of blocks that nobody has written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo import maybe_mark_dynamic
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from workers.batch import Batch, BlockId
from workers.page_plan import batch_rows
from workers.paged_kv import PagedKV

if TYPE_CHECKING:
    from collections.abc import Callable

    from workers.attention import Rule

PIECE_ROWS = 64
"""Rows of queries that one program of the kernel takes at most, of all heads that share a KV head together."""
LEAST_TILE = 16
"""Rows and keys of the smallest tile that a GPU multiplies (Triton, `tl.dot`)."""
LARGEST_TILE = 64

# One for each model, window, and decodes or not, all counted together; torch gives up at 8.
dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 64)
# As a whole or not at all: a graph break would run the plain form, which wants memory for the whole pool's scores.
_compiled: Any = torch.compile(flex_attention, fullgraph=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """Pieces with as many tokens each, of slices that all have one, or all have more. On the pool's device.

    piece_len: tokens of each. places: [num_pieces * piece_len] int64, where they are in the flat row; what fills a
    piece up repeats its first. kept: which of those are no filling, int64.
    first: [num_pieces] int32, position of each one's first token. block_counts: [num_pieces] int32.
    block_tables: [num_pieces, max_blocks] int32; what is beyond the counts is not read.
    block_order: [num_pieces, num_blocks] int32, of every block of the pool, which one of the sequence's it is, or -1.
    """

    piece_len: int
    places: torch.Tensor
    kept: torch.Tensor
    first: torch.Tensor
    block_counts: torch.Tensor
    block_tables: torch.Tensor
    block_order: torch.Tensor

    def overwrite(self, other: Pieces) -> None:
        """Take the numbers of as many pieces, as long and with tables as wide, in place."""
        for name in ("places", "kept", "first", "block_counts", "block_tables", "block_order"):
            getattr(self, name).copy_(getattr(other, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexStep:
    """The `Step` that reads the pool where it lies. Masks are made once for all layers that see equally far."""

    kv: PagedKV
    new_rows: torch.Tensor
    pieces: tuple[Pieces, ...]
    _masks: dict[tuple[int, int | None], BlockMask] = field(default_factory=dict)

    def renewed(self) -> FlexStep:
        """The same step, with masks yet to be made."""
        return FlexStep(kv=self.kv, new_rows=self.new_rows, pieces=self.pieces)

    def overwrite(self, other: FlexStep) -> None:
        """Take the numbers of a step of the same shape, in place."""
        self.new_rows.copy_(other.new_rows)
        for ours, theirs in zip(self.pieces, other.pieces, strict=True):
            ours.overwrite(theirs)

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        group = query.shape[1] // self.kv.plan.num_kv_heads
        output = query.new_empty(query.shape[2], query.shape[1], values.shape[2])
        for index, pieces in enumerate(self.pieces):
            if (index, rule.window) not in self._masks:
                self._masks[index, rule.window] = block_mask(pieces, self.kv, group, rule.window)
            attended = _attend(query[0], pieces, layer, self.kv, self._masks[index, rule.window], rule)
            output.index_copy_(0, pieces.places[pieces.kept], attended[pieces.kept])
        return output


@dataclass(frozen=True, slots=True)
class _Cut:
    """`length` tokens of a slice, at `place` in the flat row and at position `first` of its sequence."""

    place: int
    first: int
    length: int
    block_table: Sequence[BlockId]


def plan_flex(batch: Batch, kv: PagedKV, *, group: int, max_blocks: int | None = None) -> FlexStep:
    """Cut the slices of a step into pieces, and zero what was never written in the blocks that they end in.

    group: query heads per KV head. max_blocks: how wide block tables are, where a step must have the shape of another;
    None: what these take. `kv` must keep what the model computes in, not codes.
    """
    kv.clear_ends(batch)
    longest = max(1, PIECE_ROWS // group)
    decodes: list[_Cut] = []
    others: list[_Cut] = []
    place = 0
    for piece in batch:
        num_tokens = len(piece.token_ids)
        for offset in range(0, num_tokens, longest):
            length = min(longest, num_tokens - offset)
            cut = _Cut(place + offset, piece.start + offset, length, piece.block_table)
            (decodes if num_tokens == 1 else others).append(cut)
        place += num_tokens
    return FlexStep(
        kv=kv,
        new_rows=batch_rows(kv.plan, batch, kv.device),
        pieces=tuple(
            _pieces(cuts, piece_len, kv, max_blocks) for cuts, piece_len in ((decodes, 1), (others, longest)) if cuts
        ),
    )


def _pieces(cuts: Sequence[_Cut], piece_len: int, kv: PagedKV, max_blocks: int | None) -> Pieces:
    counts = torch.tensor([(cut.first + cut.length - 1) // kv.plan.block_size + 1 for cut in cuts])
    num_pieces = max(2, _round_up(len(cuts)))  # a kernel compiled for one is for one alone
    of_piece = torch.arange(len(cuts)).repeat_interleave(counts)
    order = torch.cat([torch.arange(count) for count in counts.tolist()])
    blocks = torch.tensor(
        [block for cut, count in zip(cuts, counts.tolist(), strict=True) for block in cut.block_table[:count]]
    )
    tables = torch.zeros(num_pieces, max_blocks or _round_up(int(counts.max())), dtype=torch.int32)
    tables[of_piece, order] = blocks.int()
    # Large, and nearly all of it -1: made where it is read.
    block_order = torch.full((num_pieces, kv.plan.num_blocks), -1, dtype=torch.int32, device=kv.device)
    block_order[of_piece.to(kv.device), blocks.to(kv.device)] = order.int().to(kv.device)
    offsets = torch.arange(piece_len)
    lengths = torch.tensor([cut.length for cut in cuts])[:, None]
    places = torch.zeros(num_pieces, piece_len, dtype=torch.int64)
    places[: len(cuts)] = torch.tensor([cut.place for cut in cuts])[:, None] + offsets * (offsets < lengths)
    missing = num_pieces - len(cuts)
    return Pieces(
        piece_len=piece_len,
        places=places.reshape(-1).to(kv.device),
        kept=(offsets < lengths).reshape(-1).nonzero().squeeze(1).to(kv.device),
        first=torch.tensor([cut.first for cut in cuts] + [0] * missing, dtype=torch.int32, device=kv.device),
        block_counts=torch.tensor(counts.tolist() + [0] * missing, dtype=torch.int32, device=kv.device),
        block_tables=tables.to(kv.device),
        block_order=block_order,
    )


def block_mask(pieces: Pieces, kv: PagedKV, group: int, window: int | None) -> BlockMask:
    """Which blocks the kernel reads for each piece, and which of their tokens each of its rows sees."""
    block_size, num_kv_heads = kv.plan.block_size, kv.plan.num_kv_heads
    first, block_order = pieces.first, pieces.block_order
    counts, tables = pieces.block_counts, pieces.block_tables
    if window is not None:  # those that the first token's window has left behind are not read
        left = (first - window + 1).clamp_min(0) // block_size
        columns = torch.arange(tables.shape[1], device=kv.device) + left[:, None]
        counts, tables = counts - left, tables.gather(1, columns.clamp_max(tables.shape[1] - 1))

    def is_seen(batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        piece, block_row = batch // num_kv_heads, key // block_size
        order = block_order[piece, block_row // num_kv_heads]
        position, own = order * block_size + key % block_size, first[piece] + row // group
        is_of_sequence = (order >= 0) & (block_row % num_kv_heads == batch % num_kv_heads)
        is_before = position <= own
        return is_of_sequence & (is_before if window is None else is_before & (position > own - window))

    heads = torch.arange(num_kv_heads, dtype=torch.int32, device=kv.device)
    indices = (tables[:, None, :] * num_kv_heads + heads[:, None]).view(-1, 1, 1, tables.shape[1])
    num_blocks = counts.repeat_interleave(num_kv_heads, output_size=indices.shape[0]).view(-1, 1, 1)
    num_rows = pieces.piece_len * group
    _let_vary(first, block_order, indices, num_blocks)
    maybe_mark_dynamic(indices, 3)
    return BlockMask.from_kv_blocks(
        num_blocks,
        indices,
        BLOCK_SIZE=(max(LEAST_TILE, _round_up(num_rows)), block_size),
        mask_mod=is_seen,
        seq_lengths=(num_rows, kv.plan.num_blocks * num_kv_heads * block_size),
        compute_q_blocks=False,
    )


def _attend(query: torch.Tensor, pieces: Pieces, layer: int, kv: PagedKV, mask: BlockMask, rule: Rule) -> torch.Tensor:
    """[num_pieces * piece_len, num_heads, head_dim] of the tokens at `places`; query: [num_heads, num_tokens, ...].

    The query is scaled here and not by the kernel, which would be compiled anew for each layer's own scale.
    """
    num_heads, _, head_dim = query.shape
    num_kv_heads, piece_len = kv.plan.num_kv_heads, pieces.piece_len
    group = num_heads // num_kv_heads
    picked = query.index_select(1, pieces.places) * rule.scaling
    rows = picked.view(num_kv_heads, group, -1, piece_len, head_dim).permute(2, 0, 3, 1, 4)
    rows = rows.reshape(-1, 1, piece_len * group, head_dim)
    _let_vary(rows)
    attended = _compiled(
        rows,
        kv.keys[layer].view(1, 1, -1, head_dim),
        kv.values[layer].view(1, 1, -1, head_dim),
        score_mod=None if rule.softcap is None else _capped(rule.softcap),
        block_mask=mask,
        scale=1.0,
        kernel_options={"BLOCK_M": mask.BLOCK_SIZE[0], "BLOCK_N": math.gcd(kv.plan.block_size, LARGEST_TILE)},
    )
    of_tokens = attended.view(-1, num_kv_heads, piece_len, group, head_dim).transpose(1, 2)
    return cast("torch.Tensor", of_tokens.reshape(-1, num_heads, head_dim))


def _capped(softcap: float) -> Callable[..., torch.Tensor]:
    """Scores bent to `softcap * tanh(score / softcap)` (Bello et al. 2016, logit clipping)."""

    def bend(score: torch.Tensor, *_place: torch.Tensor) -> torch.Tensor:
        return torch.tanh(score / softcap) * softcap

    return bend


def _let_vary(*tensors: torch.Tensor) -> None:
    """Have the kernel compiled for any number of pieces at once, not anew for each."""
    for tensor in tensors:
        maybe_mark_dynamic(tensor, 0)


def _round_up(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()
