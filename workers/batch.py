"""What one forward pass is asked to do: the contract between the scheduler (core) and a runner.

A `Batch` is data. It names tokens, positions and blocks; it holds no tensors and no sequence objects,
so a runner needs nothing but it and the pool it owns, and a scheduler test can compare it by value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType, TypeAlias

from bus.errors import KVCacheError
from bus.messages import Sampling, TokenLogprobs
from workers.logit_changes import LogitChanges

BlockId = NewType("BlockId", int)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """One sequence's share of a forward pass.

        0            start                    start + len(token_ids)
        |--- in pool ---|--- computed by this pass ---|

    token_ids: the tokens to compute, at positions `start .. start + len(token_ids)`.
    start: how many tokens of the sequence are already in the pool (its context length before the pass).
    block_table: the sequence's blocks in order; covers at least `start + len(token_ids)` positions.
    wants_logits: whether the last token's logits are needed (the final prefill chunk, and each decode).
    targets: tokens whose logprobs are to be told: `targets[i]` is the one that follows `token_ids[i]`. There are fewer
        than `token_ids` where the last one's logits are wanted to draw from. num_top: how many of the likeliest tokens
        at each of these places are to be told besides.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[BlockId]
    wants_logits: bool
    targets: Sequence[int] = ()
    num_top: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How to choose the token of one slice that wants one. `sampling` has been through `check_sampling`.

    position: of the token to be drawn, counted from the start of the prompt.
    banned_ids: tokens that may not come now (the end of text, while `min_tokens` is not reached).
    changes: what penalties and `logit_bias` do to its logits, as the sequence is now; None for nothing.
    """

    sampling: Sampling
    position: int
    banned_ids: Sequence[int] = ()
    changes: LogitChanges | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A token that was drawn, and its logprobs if they were asked for."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """How probable each of a slice's `targets` was, and the token that was drawn behind them if one was wanted."""

    scores: tuple[TokenLogprobs, ...]
    drawn: Drawn | None


Batch = Sequence[Slice]
Outcome: TypeAlias = Drawn | Scored | KVCacheError | None
"""What came of a slice: `Scored` if it has targets, else the token drawn; what was wrong with its numbers; or nothing,
since nothing was wanted."""


def wanted_rows(batch: Batch) -> list[int]:
    """Whose logits are needed, as places in the batch's row of tokens: of each slice those before its `targets`, then
    its last one, if that is wanted."""
    rows: list[int] = []
    end = 0
    for piece in batch:
        begin, end = end, end + len(piece.token_ids)
        if piece.targets:
            rows += range(begin, begin + len(piece.targets))
        if piece.wants_logits:
            rows.append(end - 1)
    return rows


def check_batch(batch: Batch, *, max_model_len: int, block_size: int) -> None:
    """Raise ValueError for an empty batch or slice, or one past the model's length or its own block table."""
    if not batch:
        raise ValueError("the batch is empty")
    for piece in batch:
        stop = piece.start + len(piece.token_ids)
        if stop == piece.start or piece.start < 0:
            raise ValueError(f"a slice of {len(piece.token_ids)} tokens from {piece.start} computes nothing")
        room = min(max_model_len, len(piece.block_table) * block_size)
        if stop > room:
            raise ValueError(f"a slice ends at position {stop}, past the {room} that its model and blocks have")
