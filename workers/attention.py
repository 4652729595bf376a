"""Attention over the block pool, plugged into transformers at its attention interface.

transformers' own model code computes queries, keys and values and calls `paged_attention` instead of its
cache and kernel, with what the layer is special in: a sliding window, a cap on its scores. All tokens of a
step's slices come in one flat row of the batch, `[1, heads, num_tokens, head_dim]`; the step's plan, handed
through the model as the keyword `paged_step`, says which are whose and where each lies in the pool, and
computes: by gathering (`workers.gather_attention`) or in one kernel (`workers.flex_attention`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import AttentionInterface

from workers.batch import Batch
from workers.paged_kv import PagedKV

ATTENTION_NAME = "kvcache_paged"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a layer is special in: scores times `scaling`, how many keys a query sees (its own among them), the bound
    that scores are bent to; None for no window, and for no bound."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


class Step(Protocol):
    """One forward pass, as its attention is to be computed. Whoever plans one knows how; all give the same."""

    @property
    def kv(self) -> PagedKV: ...

    @property
    def new_rows(self) -> torch.Tensor:
        """Where the step's keys and values go, `page_plan.batch_rows`."""

    def attend(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rule: Rule
    ) -> torch.Tensor:
        """One layer's attention, whose new keys and values are in the pool: [num_tokens, num_heads, head_dim].

        query: [1, num_heads, num_tokens, head_dim]. keys, values: [num_kv_heads, num_tokens, head_dim], the new ones
        as the pool gives them back.
        """


PlanStep = Callable[[Batch, PagedKV], Step]


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    paged_step: Step,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_unused: object,
) -> tuple[torch.Tensor, None]:
    """One layer's attention for all slices of a step; writes their keys and values into the pool first.

    query: [1, num_heads, num_tokens, head_dim]; key, value: [1, num_kv_heads, num_tokens, head_dim].
    sliding_window: how many keys a query sees, its own among them. softcap: the bound of a score.
    `module.layer_idx` names the layer; every mask is in the plan.
    Returns [1, num_tokens, num_heads, head_dim], and no weights.
    """
    layer = module.layer_idx
    assert isinstance(layer, int)
    # What is attended to is what the pool will give back, so that it does not matter who computed a prefix.
    keys, values = paged_step.kv.store(layer, key[0], value[0], paged_step.new_rows)
    output = paged_step.attend(layer, query, keys, values, Rule(scaling, sliding_window, softcap))
    return output.unsqueeze(0), None


def register() -> None:
    """Make `attn_implementation=ATTENTION_NAME` known to transformers; twice does no harm.

    No mask function goes with it, so that transformers builds none: the masks are in the plan.
    """
    AttentionInterface.register(ATTENTION_NAME, paged_attention)
