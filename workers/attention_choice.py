"""Choose how attention over the pool is computed, and try it against the plain path before anything relies on it.

Gathering (`workers.gather_attention`) serves every device, dtype and family. The others are kernels that read the pool
where it lies; what they can do depends on device, driver, compiler and package. So besides asking what is known
beforehand, each is run here once on random tokens, under the rules of the model's own layers, and compared.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from bus.errors import ModelUnavailable
from workers.attention import PlanStep, Rule, paged_attention
from workers.batch import BlockId, Slice
from workers.decode_graphs import FixedStep, PlanDecodes
from workers.gather_attention import plan_gather

if TYPE_CHECKING:
    from workers.batch import Batch
    from workers.loader import LoadedModel
    from workers.paged_kv import PagedKV

log = logging.getLogger(__name__)

AttentionName = Literal["auto", "gather", "flex"]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""By compute dtype: how far two ways may differ in a weighted mean of numbers that are about 1."""
_LAYER = 0


@dataclass(frozen=True, slots=True)
class ChosenAttention:
    """How to plan a step, the way's name, and why it is not a faster one where that was thinkable.

    plan_decodes: how to plan one that a CUDA graph is made of; None for no graphs.
    """

    plan_step: PlanStep
    name: str
    reason: str = ""
    plan_decodes: PlanDecodes | None = None


def choose_attention(
    choice: AttentionName, loaded: LoadedModel, kv: PagedKV, *, cuda_graphs: bool = False
) -> ChosenAttention:
    """What `choice` means for this model; `auto` is gathering on a CPU, and elsewhere flex where it is right.

    Trying one takes seconds, mostly of compiling, and leaves the pool's first blocks zero. Raises ModelUnavailable if
    one was asked for and is not to be had. cuda_graphs: whether they are wanted, of decodes; they are had where flex
    is, on a GPU.
    """
    no_graphs = "no CUDA graphs, which take flex on a GPU" if cuda_graphs else ""
    if choice == "gather" or (choice == "auto" and kv.device.type == "cpu"):
        return ChosenAttention(plan_gather, "gather", no_graphs)
    try:
        plan_flex = _flex(loaded, kv)
        if not cuda_graphs or kv.device.type != "cuda":
            return ChosenAttention(plan_flex, "flex", no_graphs)
        max_blocks = -(-loaded.shape.max_model_len // kv.plan.block_size)
        return ChosenAttention(plan_flex, "flex", plan_decodes=partial(plan_flex, max_blocks=max_blocks))
    except _NotToBeHad as error:
        if choice != "auto":
            raise ModelUnavailable(f"model {loaded.name!r} cannot have {choice} attention: {error}") from error
        log.warning("model %s gathers for attention: %s", loaded.name, error)
        return ChosenAttention(plan_gather, "gather", str(error))


class _NotToBeHad(Exception):
    """`str` says why."""


def _flex(loaded: LoadedModel, kv: PagedKV) -> Callable[..., FixedStep]:
    if loaded.has_own_attention:
        raise _NotToBeHad("its family attends in code of its own")
    if kv.dtype is not kv.compute_dtype:
        raise _NotToBeHad(f"the pool keeps {kv.dtype}, and flex reads only what the model computes in")
    if kv.device.type == "cuda" and kv.plan.block_size % 16:
        raise _NotToBeHad(f"on a GPU flex takes blocks of a multiple of 16 tokens, not of {kv.plan.block_size}")
    try:
        # Not at the top: an older torch may lack part of it, and most workers never need it.
        module: Any = importlib.import_module("workers.flex_attention")
        plan_flex: Callable[..., FixedStep] = partial(
            module.plan_flex, group=loaded.shape.num_heads // loaded.shape.num_kv_heads
        )
        _try(plan_flex, loaded, kv)
    except _NotToBeHad:
        raise
    # A compiler for this machine's GPU is foreign code: whatever it raises, there is a way without it.
    except Exception as error:
        raise _NotToBeHad(f"it failed when it was tried: {type(error).__name__}: {str(error)[:300]}") from error
    return plan_flex


def attend(
    plan_step: PlanStep,
    batch: Batch,
    kv: PagedKV,
    layer: int,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rule: Rule,
) -> torch.Tensor:
    """What attention gives a batch in one layer, planned this way; writes the batch's keys and values into the pool.

    states: queries `[1, num_heads, num_tokens, head_dim]`, keys and values `[1, num_kv_heads, num_tokens, head_dim]`,
    compute dtype, on the pool's device. Returns `[1, num_tokens, num_heads, head_dim]`.
    """
    module = torch.nn.Module()
    module.layer_idx = layer  # type: ignore[assignment]  # as transformers' own layers have one
    attended, _ = paged_attention(
        module,
        *states,
        None,
        scaling=rule.scaling,
        paged_step=plan_step(batch, kv),
        sliding_window=rule.window,
        softcap=rule.softcap,
    )
    return attended


@torch.inference_mode()
def _try(plan_step: PlanStep, loaded: LoadedModel, kv: PagedKV) -> None:
    """Raise _NotToBeHad unless a layer over random tokens comes out as by gathering, by each of the model's rules."""
    batch = _trial_batch(kv)
    num_tokens = sum(len(piece.token_ids) for piece in batch)
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads: int) -> torch.Tensor:
        states = torch.randn(1, num_heads, num_tokens, kv.plan.head_dim, generator=generator)
        return states.to(kv.device, kv.compute_dtype)

    states = draw(loaded.shape.num_heads), draw(kv.plan.num_kv_heads), draw(kv.plan.num_kv_heads)
    try:
        _fill_contexts(batch, kv, generator)
        for rule in _rules(loaded):
            attended, expected = (attend(plan, batch, kv, _LAYER, states, rule) for plan in (plan_step, plan_gather))
            difference = float((attended.float() - expected.float()).abs().max())
            if not difference <= TOLERANCE[kv.compute_dtype]:
                raise _NotToBeHad(f"when it was tried it was wrong by {difference:.2g}, under {rule}")
    finally:
        kv.clear(sorted({block for piece in batch for block in piece.block_table}))


def _rules(loaded: LoadedModel) -> Iterator[Rule]:
    """How its layers attend: families with windows may have layers without."""
    config: Any = loaded.model.config
    softcap = getattr(config, "attn_logit_softcapping", None)
    for window in dict.fromkeys((None, getattr(config, "sliding_window", None))):
        yield Rule(loaded.shape.head_dim**-0.5, window, softcap)


def _trial_batch(kv: PagedKV) -> Batch:
    """A decode, and a later chunk of a prompt if there is a block for it; what is before them is random."""
    blocks = [BlockId(block) for block in reversed(range(min(kv.plan.num_blocks, 8)))]
    half = max(1, len(blocks) // 2)
    batch = []
    for table, is_decode in ((blocks[:half], True), (blocks[half:], False)):
        if room := len(table) * kv.plan.block_size:
            num_tokens = 1 if is_decode else -(-room // 2)
            start = max(0, room - num_tokens - room % 3)  # not always to a block's end
            batch.append(Slice(token_ids=[0] * num_tokens, start=start, block_table=table, wants_logits=False))
    return batch


def _fill_contexts(batch: Batch, kv: PagedKV, generator: torch.Generator) -> None:
    for piece in batch:
        shape = (2, piece.start, kv.plan.num_kv_heads, kv.plan.head_dim)
        keys, values = torch.randn(shape, generator=generator).to(kv.compute_dtype)
        kv.write(_LAYER, piece.block_table, 0, keys, values)
