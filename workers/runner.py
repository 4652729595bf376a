"""Run a batch through a model, with its keys and values in the pool: the reference runner, any torch device.

All slices go through in one pass as one flat row of tokens with their positions; attention takes them
apart again (`workers.attention`). Families that attend in code of their own get a pass for every number of
tokens that slices have, all decodes in one, over a cache that is the pool (`workers.pool_cache`). The
vocabulary projection, and what a family does to its logits, is done only for the rows that ask for it.
The runner owns no sequence and no block: what a batch says is in the pool must be there.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, cast

import torch

from workers import fused_layer, packed_linear
from workers.batch import check_batch, wanted_rows
from workers.decode_graphs import DecodeGraphs, PlanDecodes, record_on_cuda
from workers.gather_attention import plan_gather
from workers.pool_cache import PoolCache

if TYPE_CHECKING:
    from workers.attention import PlanStep, Step
    from workers.batch import Batch
    from workers.loader import LoadedModel
    from workers.paged_kv import PagedKV


class TorchRunner:
    """One model over one pool. Call it from one thread at a time.

    `kv` must have the model's layers, KV heads, head_dim and device, and its dtype to compute in. plan_step: how
    attention is computed, see `workers.attention_choice`. plan_decodes: likewise, of decodes, to record CUDA
    graphs of (`workers.decode_graphs`); None for none. Where packing its linear layers makes the model faster they are
    packed, in place. Raises ModelUnavailable if the weights' files have been written to since they were looked at.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kv: PagedKV,
        plan_step: PlanStep = plan_gather,
        plan_decodes: PlanDecodes | None = None,
    ) -> None:
        check_pool(loaded, kv)
        loaded.files.take(loaded.model)
        if packed_linear.can_pack(loaded.dtype, loaded.device):
            fused_layer.fuse(loaded.model)
            packed_linear.pack(loaded.model)
        self.kv = kv
        self._plan_step = plan_step
        self._graphs = None
        if plan_decodes is not None:
            self._graphs = DecodeGraphs(kv, plan_decodes, self._forward, record_on_cuda)
        self._max_len = loaded.shape.max_model_len
        self._model = loaded.model
        self._runs_flat = not loaded.has_own_attention

    needs_weights = True

    @torch.inference_mode()
    def run(self, batch: Batch) -> torch.Tensor:
        """One forward pass over every slice of the batch, or a few if the family attends in its own code.

        Returns logits `[num_wanted, vocab_size]` float32 on the model's device: those of its `wanted_rows`, in their
        order. Writes the keys and values of all its tokens into the pool at their positions. Raises ValueError for an
        empty batch or slice, or one past the model's length or its own block table, before anything is written.
        """
        check_batch(batch, max_model_len=self._max_len, block_size=self.kv.plan.block_size)
        logits = self._run_flat(batch) if self._runs_flat else self._run_by_length(batch)
        return logits.float()

    def close(self) -> None:
        """Give the memory of weights and pool back. It runs nothing any more."""
        release_model(self._model)
        del self._model, self.kv, self._graphs

    def _run_flat(self, batch: Batch) -> torch.Tensor:
        if self._graphs is not None and (logits := self._graphs.run(batch)) is not None:
            return logits
        device = self.kv.device
        token_ids = torch.tensor([token for piece in batch for token in piece.token_ids], device=device)
        positions = [p for piece in batch for p in range(piece.start, piece.start + len(piece.token_ids))]
        return self._forward(
            token_ids.unsqueeze(0),
            torch.tensor([positions], device=device),
            torch.tensor(wanted_rows(batch), dtype=torch.int64, device=device),
            self._plan_step(batch, self.kv),
        )

    def _forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, wanted: torch.Tensor, step: Step
    ) -> torch.Tensor:
        """[len(wanted), vocab_size]; token_ids, positions: [1, num_tokens], wanted: places in them, all int64."""
        output = self._model(
            input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=wanted, paged_step=step
        )
        return cast("torch.Tensor", output.logits[0])

    def _run_by_length(self, batch: Batch) -> torch.Tensor:
        def num_tokens(index: int) -> int:
            return len(batch[index].token_ids)

        parts: dict[int, torch.Tensor] = {}
        for _, same in groupby(sorted(range(len(batch)), key=num_tokens), num_tokens):
            indices = list(same)
            parts |= zip(indices, self._run_equal([batch[index] for index in indices]), strict=True)
        return torch.cat([parts[index] for index in range(len(batch))])

    def _run_equal(self, batch: Batch) -> list[torch.Tensor]:
        """One pass over slices with the same number of tokens; of each the logits that it wants."""
        cache = PoolCache(batch, self.kv)
        num_tokens = len(batch[0].token_ids)
        num_kept = num_tokens if any(piece.targets for piece in batch) else 1
        output = self._model(
            input_ids=torch.tensor([list(piece.token_ids) for piece in batch], device=self.kv.device),
            position_ids=cache.position_ids,
            attention_mask=cache.attention_mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=num_kept,
        )
        skipped = num_tokens - num_kept
        return [
            logits[[row - skipped for row in wanted_rows([piece])]]
            for piece, logits in zip(batch, output.logits, strict=True)
        ]


def release_model(model: torch.nn.Module) -> None:
    """Give the memory of its weights back at once. The model is a shell afterwards, which nobody must call.

    Its modules refer to each other in circles, which only the garbage collector would find, and that takes half a
    second of everybody's time; emptied, they go by themselves.
    """
    for module in list(model.modules()):
        module.__dict__.clear()


def check_pool(loaded: LoadedModel, kv: PagedKV) -> None:
    """Raise ValueError unless the pool has the model's layers, KV heads, head_dim and dtype."""
    shape, plan = loaded.shape, kv.plan
    ours = (shape.num_layers, shape.num_kv_heads, shape.head_dim, loaded.dtype)
    theirs = (plan.num_layers, plan.num_kv_heads, plan.head_dim, kv.compute_dtype)
    if ours != theirs:
        raise ValueError(f"the pool is cut for {theirs}, the model needs {ours} (layers, KV heads, head_dim, dtype)")
