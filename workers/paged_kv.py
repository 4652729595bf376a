"""The memory that attention keys and values live in: one allocation, cut into blocks, made once.

Owns the pool tensors and the arithmetic of finding a token in them. Knows nothing of sequences, prefixes
or reference counts: which block belongs to whom is the block pool's business, and every call names its
blocks. Per layer, keys and values are `[num_blocks, num_kv_heads, block_size, head_dim]` (Kwon et al.
2023, PagedAttention, section 4.1, with heads outside positions as paged kernels want them).

Seen as rows, one layer's cache offers two views that cost nothing, and all traffic goes through them:

    block rows  [num_blocks * num_kv_heads, block_size * head_dim]     row = block * num_kv_heads + head
    token rows  [num_blocks * num_kv_heads * block_size, head_dim]     row = block row * block_size + offset

Gathering block rows in head-major order yields `[num_kv_heads, seq_len, head_dim]` in one copy of long
contiguous runs, which is what attention reads: 12 us for 1,024 tokens of 3 heads of 64, where indexing
blocks and transposing takes 59 us.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from bus.errors import BadArgument, BadTensor, NoSpace

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


def plan_pages(
    *, memory_bytes: int, num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, itemsize: int
) -> PagePlan:
    """As many whole blocks as `memory_bytes` holds; `itemsize` is bytes per element.

    Raises BadArgument if that is not even one, or a dimension is not positive.
    """
    sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    sizes |= {"block_size": block_size, "itemsize": itemsize}
    for name, size in sizes.items():
        if size < 1:
            raise BadArgument(f"{name} is {size}; it must be at least 1")
    block_bytes = 2 * num_layers * num_kv_heads * block_size * head_dim * itemsize
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


class PagedKV:
    """The pool's tensors. `keys[layer]` and `values[layer]` are views of one allocation that never moves.

    Raises NoSpace if the device cannot give that much memory.
    """

    def __init__(self, plan: PagePlan, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self.dtype = dtype
        self.device = device
        shape = (plan.num_layers, 2, plan.num_blocks, plan.num_kv_heads, plan.block_size, plan.head_dim)
        try:
            # Writing zeros, not asking for zeroed memory, so that the pages are ours now and not at the first request.
            memory = torch.empty(shape, dtype=dtype, device=device).zero_()
        except RuntimeError as error:
            raise NoSpace(f"{device} has no {plan.total_bytes} bytes for the KV pool: {error}") from error
        self._memory = memory
        self.keys: tuple[torch.Tensor, ...] = tuple(memory[layer, 0] for layer in range(plan.num_layers))
        self.values: tuple[torch.Tensor, ...] = tuple(memory[layer, 1] for layer in range(plan.num_layers))

    def read(
        self, layer: int, block_table: Sequence[BlockId], start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy out tokens `start .. stop` of one layer: keys, values, each `[stop - start, num_kv_heads, head_dim]`.

        Contiguous, in the pool's dtype and on its device. Raises BadArgument if the layer or range is not there.
        """
        self._check_range(layer, block_table, start, stop)
        rows = block_rows(self.plan, block_table, stop, self.device)

        def cut(cache: torch.Tensor) -> torch.Tensor:
            return gather_kv(cache, rows, stop)[:, start:].transpose(0, 1).contiguous()

        return cut(self.keys[layer]), cut(self.values[layer])

    def write(
        self, layer: int, block_table: Sequence[BlockId], start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Import keys and values `[seq_len, num_kv_heads, head_dim]` at positions `start ..`, in place.

        They are copied to the pool's device; their dtype must be the pool's, since a cast would change bits that
        a client gave. Raises BadTensor for a wrong shape or dtype, BadArgument if the block table is too short.
        """
        seq_len = keys.shape[0] if keys.ndim else 0
        expected = (seq_len, self.plan.num_kv_heads, self.plan.head_dim)
        for name, tensor in (("keys", keys), ("values", values)):
            if tuple(tensor.shape) != expected or tensor.dtype != self.dtype:
                raise BadTensor(
                    f"{name} are {tensor.dtype} {tuple(tensor.shape)}; the pool takes {self.dtype} "
                    f"[seq_len, {self.plan.num_kv_heads}, {self.plan.head_dim}], the same length for both"
                )
        self._check_range(layer, block_table, start, start + seq_len)
        rows = token_rows(self.plan, block_table, start, start + seq_len, self.device)
        write_kv(self.keys[layer], keys.transpose(0, 1).to(self.device), rows)
        write_kv(self.values[layer], values.transpose(0, 1).to(self.device), rows)

    def copy_blocks(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
        """Make each target hold what its source holds, in every layer; all are read before any is written.

        As many targets as sources, the targets distinct.
        """
        from_rows, to_rows = (torch.tensor(blocks, device=self.device) for blocks in (sources, targets))
        for cache in (*self.keys, *self.values):
            cache.index_copy_(0, to_rows, cache.index_select(0, from_rows))

    def difference(self, one: BlockId, other: BlockId) -> float:
        """How far two blocks differ: the largest difference of two numbers, as a part of the largest in its layer.

        The worst of all layers, keys and values; not a number if any of them is none.
        """
        worst = torch.zeros((), dtype=torch.float32, device=self.device)
        for cache in (*self.keys, *self.values):
            first, second = cache[one].float(), cache[other].float()
            largest = first.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            worst = torch.maximum(worst, (first - second).abs().max() / largest)
        return float(worst)

    def export_blocks(self, blocks: Sequence[BlockId]) -> torch.Tensor:
        """Copy whole blocks out, on the CPU: `[len(blocks), num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]`.

        Contiguous, in the pool's dtype: the bytes of one block after the other, `plan.block_bytes` each.
        """
        out = torch.empty((len(blocks), *self._block_shape), dtype=self.dtype)
        for copy, block in zip(out, blocks, strict=True):
            copy.copy_(self._memory[:, :, block])
        return out

    def import_blocks(self, blocks: Sequence[BlockId], data: bytearray) -> None:
        """Overwrite whole blocks with bytes that `export_blocks` of a pool cut alike has given, in place.

        data: only read; a bytearray since torch takes no other memory without a copy. Raises BadTensor, with nothing
        changed, unless it is `len(blocks) * plan.block_bytes` long.
        """
        if len(data) != len(blocks) * self.plan.block_bytes:
            raise BadTensor(f"{len(data)} bytes are not {len(blocks)} blocks of {self.plan.block_bytes}")
        if not blocks:
            return
        copies = torch.frombuffer(data, dtype=self.dtype).view(len(blocks), *self._block_shape)
        for block, copy in zip(blocks, copies, strict=True):
            self._memory[:, :, block].copy_(copy)

    @property
    def _block_shape(self) -> tuple[int, ...]:
        plan = self.plan
        return (plan.num_layers, 2, plan.num_kv_heads, plan.block_size, plan.head_dim)

    def _check_range(self, layer: int, block_table: Sequence[BlockId], start: int, stop: int) -> None:
        if not 0 <= layer < self.plan.num_layers:
            raise BadArgument(f"layer {layer} is not in 0..{self.plan.num_layers - 1}")
        if not 0 <= start <= stop:
            raise BadArgument(f"range {start}..{stop} is not a range of positions")
        if stop > len(block_table) * self.plan.block_size:
            raise BadArgument(
                f"{len(block_table)} blocks of {self.plan.block_size} tokens do not reach position {stop}"
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
    """Token rows of all tokens that a batch computes: `[num_kv_heads * num_tokens]` int64, head-major, distinct."""
    positions = [range(piece.start, piece.start + len(piece.token_ids)) for piece in batch]
    blocks = [piece.block_table[p // plan.block_size] for piece, of in zip(batch, positions, strict=True) for p in of]
    return _rows(plan, torch.tensor(blocks), torch.tensor(list(chain.from_iterable(positions))), device)


def _rows(plan: PagePlan, blocks: torch.Tensor, positions: torch.Tensor, device: torch.device) -> torch.Tensor:
    of_token = blocks * (plan.num_kv_heads * plan.block_size) + positions % plan.block_size
    of_head = torch.arange(plan.num_kv_heads) * plan.block_size
    return (of_head[:, None] + of_token[None, :]).reshape(-1).to(device)


def block_rows(plan: PagePlan, block_table: Sequence[BlockId], stop: int, device: torch.device) -> torch.Tensor:
    """Block rows that hold positions `0 .. stop`: `[num_kv_heads * num_blocks_used]` int64, head-major."""
    used = -(-stop // plan.block_size)
    of_block = torch.tensor(block_table[:used], dtype=torch.int64) * plan.num_kv_heads
    return (torch.arange(plan.num_kv_heads)[:, None] + of_block[None, :]).reshape(-1).to(device)


def write_kv(cache: torch.Tensor, states: torch.Tensor, rows: torch.Tensor) -> None:
    """Scatter keys or values into their slots, in place.

    cache:  [num_blocks, num_kv_heads, block_size, head_dim], one layer's keys or values.
    states: [num_kv_heads, num_tokens, head_dim], any strides, same dtype and device as `cache`.
    rows:   [num_kv_heads * num_tokens] int64 from `token_rows`. Two equal rows are a scheduler bug.
    Raises IndexError if `rows` and `states` differ in length, or a row is outside the cache.
    """
    head_dim = cache.shape[-1]
    cache.view(-1, head_dim).index_copy_(0, rows, states.reshape(-1, head_dim))


def gather_kv(cache: torch.Tensor, rows: torch.Tensor, context_len: int) -> torch.Tensor:
    """The first `context_len` tokens of a sequence, out of its blocks in one copy.

    cache: [num_blocks, num_kv_heads, block_size, head_dim]; rows: from `block_rows` for at least `context_len`.
    Returns [num_kv_heads, context_len, head_dim] in the cache's dtype: a copy, heads a whole number of blocks apart.
    """
    num_blocks, num_kv_heads, block_size, head_dim = cache.shape
    runs = cache.view(num_blocks * num_kv_heads, block_size * head_dim).index_select(0, rows)
    return runs.view(num_kv_heads, -1, head_dim)[:, :context_len]
