"""Run a batch through a model, with its keys and values in the pool: the reference runner, any torch device.

All slices go through in one pass as one flat row of tokens with their positions; attention takes them
apart again (`workers.attention`). The vocabulary projection is done only for the rows that ask for it.
The runner owns no sequence and no block: what a batch says is in the pool must be there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from workers.attention import plan_step

if TYPE_CHECKING:
    from workers.batch import Batch
    from workers.loader import LoadedModel
    from workers.paged_kv import PagedKV


class TorchRunner:
    """One model over one pool. Call it from one thread at a time.

    `kv` must have the model's layers, KV heads, head_dim, dtype and device.
    """

    def __init__(self, loaded: LoadedModel, kv: PagedKV) -> None:
        shape, plan = loaded.shape, kv.plan
        ours = (shape.num_layers, shape.num_kv_heads, shape.head_dim, loaded.dtype)
        theirs = (plan.num_layers, plan.num_kv_heads, plan.head_dim, kv.dtype)
        if ours != theirs:
            raise ValueError(
                f"the pool is cut for {theirs}, the model needs {ours} (layers, KV heads, head_dim, dtype)"
            )
        self.kv = kv
        self._max_len = shape.max_model_len
        self._body = loaded.model.base_model
        self._head = cast("torch.nn.Module", loaded.model.get_output_embeddings())  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """One forward pass over every slice of the batch.

        Returns logits `[num_wanting_logits, vocab_size]` float32 on the model's device: one row for the last
        token of each slice that wants them, in the batch's order. Writes the keys and values of all its tokens
        into the pool at their positions. Raises ValueError for an empty batch or slice, or one past the
        model's length or its own block table, before anything is written.
        """
        self._check(batch)
        device = self.kv.device
        token_ids = torch.tensor([token for piece in batch for token in piece.token_ids], device=device)
        positions = torch.cat([torch.arange(piece.start, piece.start + len(piece.token_ids)) for piece in batch])
        step = plan_step(batch, self.kv)
        output = self._body(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.to(device).unsqueeze(0),
            use_cache=False,
            paged_step=step,
        )
        wanted = [plan.end - 1 for plan, piece in zip(step.slices, batch, strict=True) if piece.wants_logits]
        hidden = cast("torch.Tensor", output.last_hidden_state)[0, wanted]
        return cast("torch.Tensor", self._head(hidden)).float()

    def _check(self, batch: Batch) -> None:
        if not batch:
            raise ValueError("the batch is empty")
        for piece in batch:
            stop = piece.start + len(piece.token_ids)
            if stop == piece.start or piece.start < 0:
                raise ValueError(f"a slice of {len(piece.token_ids)} tokens from {piece.start} computes nothing")
            room = min(self._max_len, len(piece.block_table) * self.kv.plan.block_size)
            if stop > room:
                raise ValueError(f"a slice ends at position {stop}, past the {room} that its model and blocks have")
