"""The block pool as a transformers `Cache`, for model families that compute attention in code of their own.

Falcon and Bloom do not call the attention interface: they hand a layer's new keys and values to a cache,
take back the whole context, and attend with biases that only they know (ALiBi, Press et al. 2022). Here
that cache is the pool. A pass takes slices with the same number of new tokens as rows of a batch; contexts
of different length are lined up at their ends, the way `generate` pads a batch:

        |. . . . |-- context of row 0 --|- new -|
        |------------- of row 1 --------|- new -|      `attention_mask` is 0 where there are dots

One `PoolCache` serves one pass. The tokens written are in the pool when the pass is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import Cache

from workers.paged_kv import PagedKV, block_rows, gather_kv, token_rows, write_kv

if TYPE_CHECKING:
    from workers.batch import Batch


class PoolCache(Cache):
    """What one pass over `batch`, whose slices all have the same number of tokens, reads and writes in the pool.

    attention_mask: [num_slices, longest context] int64, 1 where there is a token; None if all are as long.
    position_ids: [num_slices, num_tokens] int64, of the new tokens.
    """

    def __init__(self, batch: Batch, kv: PagedKV) -> None:
        super().__init__(layers=[])
        self._kv = kv
        self._num_tokens = len(batch[0].token_ids)
        starts = torch.tensor([piece.start for piece in batch], device=kv.device)
        self._lengths = [piece.start + self._num_tokens for piece in batch]
        self._longest = max(self._lengths)
        self._new_rows = [
            token_rows(kv.plan, piece.block_table, piece.start, stop, kv.device)
            for piece, stop in zip(batch, self._lengths, strict=True)
        ]
        self._context_rows = [
            block_rows(kv.plan, piece.block_table, stop, kv.device)
            for piece, stop in zip(batch, self._lengths, strict=True)
        ]
        self.position_ids = starts[:, None] + torch.arange(self._num_tokens, device=kv.device)
        self.attention_mask = self._padding_mask() if min(self._lengths) < self._longest else None

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one layer's new keys and values, `[num_slices, num_kv_heads, num_tokens, head_dim]`, into the pool.

        Returns those of the whole contexts, `[num_slices, num_kv_heads, longest context, head_dim]`, padded
        with zeros at the front.
        """
        return (
            self._exchange(self._kv.keys[layer_idx], key_states),
            self._exchange(self._kv.values[layer_idx], value_states),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens are before the new ones, padding among them."""
        return self._longest - self._num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length of the contexts, and how many of their tokens are missing at the front: none."""
        return self._longest, 0

    def _exchange(self, cache: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        contexts = cache.new_zeros((len(states), states.shape[1], self._longest, states.shape[3]))
        for row, length in enumerate(self._lengths):
            write_kv(cache, states[row], self._new_rows[row])
            contexts[row, :, self._longest - length :] = gather_kv(cache, self._context_rows[row], length)
        return contexts

    def _padding_mask(self) -> torch.Tensor:
        lengths = torch.tensor(self._lengths, device=self._kv.device)
        places = torch.arange(self._longest, device=self._kv.device)
        return (places >= self._longest - lengths[:, None]).long()
