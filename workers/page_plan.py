"""How a model's pool is cut into blocks, and in which row of its tensors a token lies.

Arithmetic over block ids and positions; owns no memory. Seen as rows, one layer's keys or values,
`[num_blocks, num_kv_heads, block_size, head_dim]`, offer two views that cost nothing, and all traffic goes by them:

    block rows  [num_blocks * num_kv_heads, block_size * head_dim]     row = block * num_kv_heads + head
    token rows  [num_blocks * num_kv_heads * block_size, head_dim]     row = block row * block_size + offset

Gathering block rows in head-major order yields `[num_kv_heads, seq_len, head_dim]` in one copy of long
contiguous runs, which is what attention reads: 12 us for 1,024 tokens of 3 heads of 64, where indexing
blocks and transposing takes 59 us. A layer's values lie behind its keys, so rows of both are one list (`of_both`), and
one copy moves both.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from bus.errors import BadArgument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.batch import Batch, BlockId


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlan:
    """How the pool is cut. `block_bytes` is one block across all layers, keys and values."""

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    block_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_block_rows(self) -> int:
        """Of one layer's keys, or values."""
        return self.num_blocks * self.num_kv_heads

    @property
    def num_token_rows(self) -> int:
        return self.num_block_rows * self.block_size


def plan_pages(
    *,
    memory_bytes: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    itemsize: int,
    scale_bytes: int = 0,
) -> PagePlan:
    """As many whole blocks as `memory_bytes` holds; `itemsize` is bytes per element, `scale_bytes` per scale.

    Raises BadArgument if that is not even one, or a dimension is not positive.
    """
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    sizes |= {"block_size": block_size, "itemsize": itemsize}
    for name, size in sizes.items():
        if size < 1:
            raise BadArgument(f"{name} is {size}; it must be at least 1")
    block_bytes = 2 * num_layers * num_kv_heads * block_size * (head_dim * itemsize + scale_bytes)
    num_blocks = memory_bytes // block_bytes
    if num_blocks < 1:
        raise BadArgument(f"KV memory of {memory_bytes} bytes holds no block: one takes {block_bytes} bytes")
    return PagePlan(
        num_layers=num_layers,
        num_blocks=num_blocks,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        head_dim=head_dim,
        block_bytes=block_bytes,
    )


def token_rows(
    plan: PagePlan, block_table: Sequence[BlockId], start: int, stop: int, device: torch.device
) -> torch.Tensor:
    """Token rows of positions `start .. stop`: `[num_kv_heads * (stop - start)]` int64, head-major, distinct."""
    positions = torch.arange(start, stop)
    # Only the blocks in range go into the tensor: a decode step of a long sequence touches one of them.
    first = start // plan.block_size
    last = -(-stop // plan.block_size)
    blocks = torch.tensor(block_table[first:last], dtype=torch.int64)
    return _rows(plan, blocks[positions // plan.block_size - first], positions, device)


def batch_rows(plan: PagePlan, batch: Batch, device: torch.device) -> torch.Tensor:
    """Token rows of all tokens that a batch computes, of keys and then of values: `[2 * num_kv_heads * num_tokens]`
    int64, each half head-major, distinct."""
    positions = [range(piece.start, piece.start + len(piece.token_ids)) for piece in batch]
    blocks = [piece.block_table[p // plan.block_size] for piece, of in zip(batch, positions, strict=True) for p in of]
    of_keys = _rows(plan, torch.tensor(blocks), torch.tensor(list(chain.from_iterable(positions))), device)
    return of_both(of_keys, plan.num_token_rows)


def of_both(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Those rows of a layer's keys, and then the same of its values; num_rows: how many its keys have."""
    return torch.cat([rows, rows + num_rows])


def _rows(plan: PagePlan, blocks: torch.Tensor, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
    of_token = blocks * (plan.num_kv_heads * plan.block_size) + positions % plan.block_size
    of_head = torch.arange(plan.num_kv_heads) * plan.block_size
    return (of_head[:, None] + of_token[None, :]).reshape(-1).to(device)


def block_rows(plan: PagePlan, block_table: Sequence[BlockId], stop: int, device: torch.device) -> torch.Tensor:
    """Block rows that hold positions `0 .. stop`: `[num_kv_heads * num_blocks_used]` int64, head-major."""
    used = -(-stop // plan.block_size)
    of_block = torch.tensor(block_table[:used], dtype=torch.int64) * plan.num_kv_heads
    return (torch.arange(plan.num_kv_heads)[:, None] + of_block[None, :]).reshape(-1).to(device)
