"""The memory that attention keys and values live in: one allocation, cut into blocks, made once.

Owns the pool tensors. Knows nothing of sequences, prefixes or reference counts: which block belongs to whom is the
block pool's business, and every call names its blocks. Per layer, keys and values are
`[num_blocks, num_kv_heads, block_size, head_dim]` (Kwon et al. 2023, PagedAttention, section 4.1, with heads outside
positions as paged kernels want them); all traffic goes by rows of them (`workers.page_plan`).

The pool's dtype need not be the model's (`workers.kv_precision`): what is stored is converted once, when it is
written, and everyone reads it converted back, also the step that wrote it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from bus.errors import BadArgument, BadTensor, NoSpace
from workers.kv_precision import dequantise, is_scaled, quantise
from workers.page_plan import PagePlan, block_rows, of_both, token_rows
from workers.staging import to_device, to_host

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers.batch import Batch, BlockId

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
"""What rows are moved as: a row copied by index goes element by element, however many bytes an element has."""


class PagedKV:
    """The pool's tensors. `keys[layer]` and `values[layer]` are views of one allocation that never moves.

    dtype: how they are stored. compute_dtype: what goes in and comes out, the model's; None: the same. Where the
    stored ones are codes, scales for keys and values, `[num_blocks, num_kv_heads, block_size]` in
    the compute dtype, are in the same allocation, and the plan must have room for them.
    Raises NoSpace if the device cannot give that much memory.
    """

    def __init__(
        self, plan: PagePlan, dtype: torch.dtype, device: torch.device, compute_dtype: torch.dtype | None = None
    ) -> None:
        self.plan = plan
        self.dtype = dtype
        self.compute_dtype = compute_dtype or dtype
        self.device = device
        try:
            # Writing zeros, not asking for zeroed memory, so that the pages are ours now and not at the first request.
            memory = torch.empty(plan.total_bytes, dtype=torch.uint8, device=device).zero_()
        except RuntimeError as error:
            raise NoSpace(f"{device} has no {plan.total_bytes} bytes for the KV pool: {error}") from error
        places = (plan.num_layers, 2, plan.num_blocks, plan.num_kv_heads, plan.block_size)
        num_codes = math.prod(places) * plan.head_dim * dtype.itemsize
        # Scales come first, because they need to be aligned and codes of one byte do not.
        scales, states = memory[:-num_codes].view(self.compute_dtype), memory[-num_codes:].view(dtype)
        self._states = states.view(*places, plan.head_dim)
        self._scales = scales.view(*places, 1) if is_scaled(dtype) else None
        self.keys, self.values = _of_layers(self._states)
        self._key_scales, self._value_scales = _of_layers(scales.view(places)) if is_scaled(dtype) else ((), ())
        self._rows = [_as_words(layer) for layer in self._states]
        self._scale_rows = [] if self._scales is None else [_as_words(layer) for layer in self._scales]
        self._scratch = torch.empty((0, plan.block_size * plan.head_dim), dtype=dtype, device=device)
        # Of each block: how many of its tokens may be anything. Behind them are zeros.
        self._filled = [plan.block_size] * plan.num_blocks
        self._parts = tuple(
            part.view(torch.uint8).view(plan.num_layers, 2, plan.num_blocks, -1)
            for part in (states, scales)
            if part.numel()
        )

    def store(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one layer's new keys and values, in place, and return them as everyone will read them.

        keys, values: [num_kv_heads, num_tokens, head_dim], any strides, in the compute dtype.
        rows: [2 * num_kv_heads * num_tokens] int64, token rows of keys and then of values (`page_plan.of_both`). Two
        equal rows are a scheduler bug. Raises IndexError if they are not as many as the states, or outside the pool.
        """
        states = torch.cat([keys, values])
        if self._scale_rows:
            codes, scales = quantise(states, self.dtype)
            _write_rows(self._rows[layer], codes, rows)
            _write_rows(self._scale_rows[layer], scales, rows)
            states = dequantise(codes, scales)
        else:
            stored = states.to(self.dtype)
            _write_rows(self._rows[layer], stored, rows)
            if stored is states:
                return keys, values
            states = stored.to(self.compute_dtype)
        return states[: keys.shape[0]], states[keys.shape[0] :]

    def clear_ends(self, batch: Batch) -> None:
        """Zero what lies behind the last token of each slice in the block that it ends in, in every layer, in place.

        For whoever reads whole blocks: a masked key has no weight, but 0 times NaN is NaN, and a block's end holds what
        its last owner left. Nobody has written there for this sequence, and nobody else's context reaches there, since
        only full blocks are shared. Before each step of a pool that is read so; a block whose end is zeros already is
        not touched, which is nearly every one in a step of decodes.
        """
        block_size = self.plan.block_size
        for piece in batch:
            stop = piece.start + len(piece.token_ids)
            last = (stop - 1) // block_size
            for block in piece.block_table[piece.start // block_size : last]:
                self._filled[block] = block_size
            block, end = piece.block_table[last], stop - last * block_size
            if end < self._filled[block]:
                for part in (self._states, self._scales):
                    if part is not None:
                        part[:, :, block, :, end : self._filled[block]] = 0
            self._filled[block] = end

    def gather(
        self, layer: int, rows: torch.Tensor, stale_rows: torch.Tensor | None = None, *, by_token: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy block rows, or token rows, of one layer's keys and values: `[num tokens in them, head_dim]` each.

        In the compute dtype. stale_rows: of the result, to be zeros.
        """
        width = 1 if by_token else self.plan.block_size
        gathered = []
        for cache, scales in ((self.keys[layer], self._key_scales), (self.values[layer], self._value_scales)):
            states = self._take(cache, rows, width * self.plan.head_dim).view(-1, self.plan.head_dim)
            if scales:
                states = dequantise(states, self._take(scales[layer], rows, width).view(-1, 1))
            elif self.dtype is not self.compute_dtype:
                states = states.to(self.compute_dtype)
            gathered.append(states if stale_rows is None else states.index_fill_(0, stale_rows, 0.0))
        return gathered[0], gathered[1]

    def borrow(self, layer: int, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `gather` gives for block rows, in memory that the next call overwrites, whatever its layer.

        rows: of keys and then of values (`page_plan.of_both`).
        That memory stays in the processor's cache: a step of 32 decodes at 1,024 tokens (SmolLM2, bfloat16) takes 361
        milliseconds and not 428.
        """
        if self.dtype is not self.compute_dtype:
            return self.gather(layer, rows[: rows.shape[0] // 2])
        width, num_rows = self.plan.block_size * self.plan.head_dim, rows.shape[0]
        if self._scratch.shape[0] < num_rows:
            self._scratch = torch.empty((num_rows, width), dtype=self.dtype, device=self.device)
        out = self._scratch[:num_rows]
        torch.index_select(self._states[layer].view(-1, width), 0, rows, out=out)
        keys, values = out.view(2, -1, self.plan.head_dim)
        return keys, values

    def read(
        self, layer: int, block_table: Sequence[BlockId], start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy out tokens `start .. stop` of one layer: keys, values, each `[stop - start, num_kv_heads, head_dim]`.

        Contiguous, in the compute dtype, on the pool's device. Raises BadArgument if the layer or range is not there.
        """
        self._check_range(layer, block_table, start, stop)
        rows = block_rows(self.plan, block_table, stop, self.device)
        shape = (self.plan.num_kv_heads, -1, self.plan.head_dim)
        keys, values = (states.view(shape)[:, start:stop].transpose(0, 1) for states in self.gather(layer, rows))
        return keys.clone(memory_format=torch.contiguous_format), values.clone(memory_format=torch.contiguous_format)

    def write(
        self, layer: int, block_table: Sequence[BlockId], start: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Import keys and values `[seq_len, num_kv_heads, head_dim]` at positions `start ..`, in place.

        They are copied to the pool's device; their dtype must be the compute dtype, since a cast would change bits
        that a client gave. Raises BadTensor for a wrong shape or dtype, BadArgument if the block table is too short.
        """
        seq_len = keys.shape[0] if keys.ndim else 0
        expected = (seq_len, self.plan.num_kv_heads, self.plan.head_dim)
        for name, tensor in (("keys", keys), ("values", values)):
            if tuple(tensor.shape) != expected or tensor.dtype != self.compute_dtype:
                raise BadTensor(
                    f"{name} are {tensor.dtype} {tuple(tensor.shape)}; the pool takes {self.compute_dtype} "
                    f"[seq_len, {self.plan.num_kv_heads}, {self.plan.head_dim}], the same length for both"
                )
        self._check_range(layer, block_table, start, start + seq_len)
        rows = token_rows(self.plan, block_table, start, start + seq_len, self.device)
        rows = of_both(rows, self.plan.num_token_rows)
        self.store(layer, keys.transpose(0, 1).to(self.device), values.transpose(0, 1).to(self.device), rows)
        self._fill(block_table[start // self.plan.block_size : -(-(start + seq_len) // self.plan.block_size)])

    @staticmethod
    def _take(cache: torch.Tensor, rows: torch.Tensor, width: int) -> torch.Tensor:
        """Rows of `width` elements: `[len(rows), width]`. Not every device copies 8-bit floats by index: so bytes."""
        if cache.dtype.itemsize == 1:
            return cache.view(torch.uint8).view(-1, width).index_select(0, rows).view(cache.dtype)
        return cache.view(-1, width).index_select(0, rows)

    def copy_blocks(self, sources: Sequence[BlockId], targets: Sequence[BlockId]) -> None:
        """Make each target hold what its source holds, in every layer; all are read before any is written.

        As many targets as sources, the targets distinct.
        """
        from_rows, to_rows = (torch.tensor(blocks, device=self.device) for blocks in (sources, targets))
        for cache in (*self.keys, *self.values, *self._key_scales, *self._value_scales):
            moved = cache.view(torch.uint8)  # as in `_take`
            moved.index_copy_(0, to_rows, moved.index_select(0, from_rows))
        filled = [self._filled[block] for block in sources]
        for block, end in zip(targets, filled, strict=True):
            self._filled[block] = end

    def clear(self, blocks: Sequence[BlockId]) -> None:
        """Zero whole blocks, in every layer."""
        for part in self._parts:
            part[:, :, torch.tensor(blocks, device=self.device)] = 0

    def difference(self, one: BlockId, other: BlockId) -> float:
        """How far two blocks differ, as they are read: the largest difference of two numbers, as a part of the
        largest in its layer.

        The worst of all layers, keys and values; not a number if any of them is none.
        """
        worst = torch.zeros((), dtype=torch.float32, device=self.device)
        # Codes are no measure: where scales differ, other codes may stand for the same numbers.
        rows = [block_rows(self.plan, [block], self.plan.block_size, self.device) for block in (one, other)]
        for layer in range(self.plan.num_layers):
            for first, second in zip(*(self.gather(layer, of_block) for of_block in rows), strict=True):
                largest = first.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
                worst = torch.maximum(worst, (first.float() - second.float()).abs().max() / largest)
        return float(worst)

    def export_blocks(self, blocks: Sequence[BlockId]) -> torch.Tensor:
        """Copy whole blocks out, on the CPU: `[len(blocks), plan.block_bytes]` uint8, contiguous.

        A block is `[num_layers, 2 (K, V), num_kv_heads, block_size, head_dim]` as it is stored, and after that its
        scales, if it has any, `[num_layers, 2, num_kv_heads, block_size]`.
        """
        out = torch.empty((len(blocks), self.plan.block_bytes), dtype=torch.uint8, device=self.device)
        for block, copy in zip(blocks, out, strict=True):
            for part, of_part in zip(self._parts, self._split(copy), strict=True):
                of_part.copy_(part[:, :, block])
        return to_host(out)

    def import_blocks(self, blocks: Sequence[BlockId], data: bytearray) -> None:
        """Overwrite whole blocks with bytes that `export_blocks` of a pool cut alike has given, in place.

        data: only read; a bytearray since torch takes no other memory without a copy. Raises BadTensor, with nothing
        changed, unless it is `len(blocks) * plan.block_bytes` long.
        """
        if len(data) != len(blocks) * self.plan.block_bytes:
            raise BadTensor(f"{len(data)} bytes are not {len(blocks)} blocks of {self.plan.block_bytes}")
        if not blocks:
            return
        copies = to_device(torch.frombuffer(data, dtype=torch.uint8), self.device).view(len(blocks), -1)
        for block, copy in zip(blocks, copies, strict=True):
            for part, of_part in zip(self._parts, self._split(copy), strict=True):
                part[:, :, block].copy_(of_part)
        self._fill(blocks)

    def _fill(self, blocks: Sequence[BlockId]) -> None:
        """Remember that these may hold anything, up to their ends."""
        for block in blocks:
            self._filled[block] = self.plan.block_size

    def _split(self, block: torch.Tensor) -> list[torch.Tensor]:
        """The bytes of one exported block, cut into those of each part: `[num_layers, 2, bytes]`."""
        widths = [part.shape[-1] for part in self._parts]
        parts = block.split([2 * self.plan.num_layers * width for width in widths])  # type: ignore[no-untyped-call]
        return [part.view(self.plan.num_layers, 2, -1) for part in parts]

    def _check_range(self, layer: int, block_table: Sequence[BlockId], start: int, stop: int) -> None:
        if not 0 <= layer < self.plan.num_layers:
            raise BadArgument(f"layer {layer} is not in 0..{self.plan.num_layers - 1}")
        if not 0 <= start <= stop:
            raise BadArgument(f"range {start}..{stop} is not a range of positions")
        if stop > len(block_table) * self.plan.block_size:
            raise BadArgument(
                f"{len(block_table)} blocks of {self.plan.block_size} tokens do not reach position {stop}"
            )


def _of_layers(memory: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Keys' and values' parts of `[num_layers, 2, ...]`, layer by layer."""
    return tuple(layer[0] for layer in memory), tuple(layer[1] for layer in memory)


def _as_words(layer: torch.Tensor) -> torch.Tensor:
    """One layer's memory, `[2, num_blocks, num_kv_heads, block_size, width]`, as token rows of the widest words."""
    num_bytes = layer.shape[-1] * layer.itemsize
    offset = layer.storage_offset() * layer.itemsize
    word = next(word for word in WORDS if num_bytes % word.itemsize == 0 == offset % word.itemsize)
    return layer.view(word).view(-1, num_bytes // word.itemsize)


def _write_rows(memory: torch.Tensor, states: torch.Tensor, rows: torch.Tensor) -> None:
    """Scatter states, contiguous, into the rows of a layer's memory as `_as_words` gives it, in place."""
    memory.index_copy_(0, rows, states.view(memory.dtype).view(-1, memory.shape[1]))
