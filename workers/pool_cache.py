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

from workers.page_plan import batch_rows, token_rows
from workers.paged_kv import PagedKV

if TYPE_CHECKING:
    from workers.batch import Batch, Slice


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
        self._num_slices = len(batch)
        self._lengths = [piece.start + self._num_tokens for piece in batch]
        self._longest = max(self._lengths)
        self._new_rows = batch_rows(kv.plan, batch, kv.device)
        self._context_rows = torch.stack([self._padded_rows(piece) for piece in batch]).reshape(-1)
        missing = (self._longest - torch.tensor(self._lengths))[:, None, None]
        is_padding = (torch.arange(self._longest) < missing).expand(-1, kv.plan.num_kv_heads, -1)
        self._padding = is_padding.reshape(-1).nonzero().squeeze(1).to(kv.device)
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
        num_kv_heads, head_dim = key_states.shape[1], key_states.shape[3]
        # As one row of tokens: [num_kv_heads, num_slices * num_tokens, head_dim].
        new_keys = key_states.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        new_values = value_states.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
        self._kv.store(layer_idx, new_keys, new_values, self._new_rows)
        gathered = self._kv.gather(layer_idx, self._context_rows, self._padding, by_token=True)
        keys, values = (states.view(self._num_slices, num_kv_heads, -1, head_dim) for states in gathered)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens are before the new ones, padding among them."""
        return self._longest - self._num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length of the contexts, and how many of their tokens are missing at the front: none."""
        return self._longest, 0

    def _padded_rows(self, piece: Slice) -> torch.Tensor:
        """Token rows of a slice's context, its first token before them as padding: [num_kv_heads, longest context]."""
        length = piece.start + self._num_tokens
        rows = token_rows(self._kv.plan, piece.block_table, 0, length, self._kv.device)
        rows = rows.view(self._kv.plan.num_kv_heads, length)
        return torch.cat([rows[:, :1].expand(-1, self._longest - length), rows], dim=1)

    def _padding_mask(self) -> torch.Tensor:
        lengths = torch.tensor(self._lengths, device=self._kv.device)
        places = torch.arange(self._longest, device=self._kv.device)
        return (places >= self._longest - lengths[:, None]).long()
