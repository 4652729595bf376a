"""The tokens of one step from its logits, whichever runner they come from and on whatever device they are.

For each row: look whether its numbers are numbers, apply the generation's changes to it, take the likeliest token or
draw one (`workers.draws`), and say how probable that was, in the model's own distribution, where it was asked for.
Rows that only want their likeliest token cost one pass that finds it; the others are copied to the host. Of rows whose
next token is a prompt's only that token's logprob is left, and the likeliest ones'.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from bus.errors import InternalError
from bus.messages import TokenLogprobs
from kvcache.sampling_checks import MAX_LOGPROBS
from workers.batch import Batch, Draw, Drawn, Outcome, Scored, Slice
from workers.draws import draw_tokens, is_greedy, likeliest, weigh

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Ints = NDArray[np.int64]

_SCORED_ROWS = 32
"""Rows of a prompt that are looked at together: what that takes besides them is a few megabytes."""


def results(logits: torch.Tensor, batch: Batch, draws: Sequence[Draw | None]) -> list[Outcome]:
    """What comes of each slice.

    logits: [num_wanted, vocab_size] float32, any device: the batch's `wanted_rows`. draws: one for each slice, None
    where no token is wanted.
    """
    wanted = [draw for draw in draws if draw is not None]
    if not any(piece.targets for piece in batch):
        drawn = iter(sample(logits, wanted) if wanted else ())
        return [None if draw is None else next(drawn) for draw in draws]
    ends = list(accumulate(len(piece.targets) + piece.wants_logits for piece in batch))
    last = [end - 1 for end, draw in zip(ends, draws, strict=True) if draw is not None]
    drawn = iter(sample(logits[last], wanted) if wanted else ())
    found: list[Outcome] = []
    for end, piece, draw in zip(ends, batch, draws, strict=True):
        token = None if draw is None else next(drawn)
        first = end - piece.wants_logits - len(piece.targets)
        found.append(_scored(logits[first : first + len(piece.targets)], piece, token) if piece.targets else token)
    return found


def _scored(logits: torch.Tensor, piece: Slice, drawn: Drawn | InternalError | None) -> Scored | InternalError:
    if isinstance(drawn, InternalError):
        return drawn
    scores = score(logits, piece.targets, piece.num_top)
    if scores is None:
        return InternalError(f"non-finite logits for positions {piece.start + 1} to {piece.start + len(piece.targets)}")
    return Scored(scores, drawn)


def score(logits: torch.Tensor, targets: Sequence[int], num_top: int) -> tuple[TokenLogprobs, ...] | None:
    """How probable each target was by its row, and the `num_top` likeliest tokens there; None if a number is none.

    logits: [num_targets, vocab_size] float32, any device; they are not changed.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(targets), _SCORED_ROWS):
        rows = logits[start : start + _SCORED_ROWS]
        scale = rows.logsumexp(dim=1)
        wanted = torch.tensor(targets[start : start + _SCORED_ROWS], device=rows.device)
        own = rows.gather(1, wanted[:, None])[:, 0] - scale
        if not (scale.isfinite() & own.isfinite()).all():
            return None
        top, top_ids = rows.topk(min(num_top, rows.shape[1]), dim=1)
        top_scores = (top - scale[:, None]).tolist()
        found += [
            TokenLogprobs(logprob, tuple(zip(ids, scores, strict=True)))
            for logprob, ids, scores in zip(own.tolist(), top_ids.tolist(), top_scores, strict=True)
        ]
    return tuple(found)


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn | InternalError]:
    """One token for each row, or the error of that row alone.

    logits: [num_draws, vocab_size] float32, any device; they are not changed.
    A row with a NaN or an infinity gives InternalError, since any token drawn from it would be noise.
    """
    if logits.shape[0] != len(draws):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(draws)} draws")
    tokens, is_finite = _survey(logits)
    special = [row for row, draw in enumerate(draws) if is_finite[row] and not _is_plain(draw)]
    logprobs: dict[int, TokenLogprobs | None] = {}
    if special:
        wanted = [draws[row] for row in special]
        own = _on_host(logits, special)
        drawn = _draw(own, tokens[special], wanted)
        tokens[special] = drawn
        is_finite[special] = drawn >= 0
        logprobs = dict(zip(special, _logprobs(own, drawn, wanted), strict=True))
    return [
        Drawn(token, logprobs.get(row)) if is_good else _failure(draws[row])
        for row, (token, is_good) in enumerate(zip(tokens.tolist(), is_finite.tolist(), strict=True))
    ]


def _survey(logits: torch.Tensor) -> tuple[Ints, NDArray[np.bool_]]:
    """The likeliest token of each row, the lowest id of equals, and whether all of the row's numbers are finite."""
    if logits.device.type != "cpu":
        highest, tokens = logits.max(dim=1)
        is_finite = highest.isfinite() & logits.amin(dim=1).isfinite()
        return tokens.cpu().numpy(), is_finite.cpu().numpy()
    rows = logits.numpy()
    found = rows.argmax(axis=1)
    # A NaN passes through both ends and an infinity is one of them; `isfinite` of all would take ten times as long.
    return found, np.isfinite(rows[np.arange(len(rows)), found]) & np.isfinite(rows.min(axis=1))


def _is_plain(draw: Draw) -> bool:
    """Whether the model's likeliest token is all that is asked for."""
    sampling = draw.sampling
    return (
        is_greedy(sampling.temperature) and sampling.logprobs is None and not draw.banned_ids and draw.changes is None
    )


def _on_host(logits: torch.Tensor, rows: list[int]) -> Floats:
    """Those rows, to be read only."""
    if logits.device.type != "cpu":
        return logits[rows].cpu().numpy()
    every = logits.numpy()  # and its copy, not torch's, whose threads would spin while the next step computes
    return every if len(rows) == len(every) else every[rows]


def _draw(own: Floats, tokens: Ints, draws: Sequence[Draw]) -> Ints:
    """A token for each row of the model's own logits, of which `tokens` are the likeliest; -1 where all are banned."""
    logits = _changed(own, draws)
    if logits is not own:
        tokens = logits.argmax(axis=1)
    has_any = logits[np.arange(len(tokens)), tokens] > -np.inf
    rows = [row for row in np.flatnonzero(has_any).tolist() if not is_greedy(draws[row].sampling.temperature)]
    if rows:
        chosen = logits if len(rows) == len(draws) else logits[rows]
        tokens[rows] = draw_tokens(chosen, [draws[row] for row in rows])
    return np.where(has_any, tokens, -1)


def _changed(own: Floats, draws: Sequence[Draw]) -> Floats:
    """The logits to draw from: a copy, if any row has changes or banned tokens."""
    changed = [(row, draw.changes) for row, draw in enumerate(draws) if draw.changes is not None]
    banned = [(row, token) for row, draw in enumerate(draws) for token in draw.banned_ids]
    if not changed and not banned:
        return own
    logits = own.copy()
    for row, changes in changed:
        logits[row, changes.token_ids] = changes.apply(own[row, changes.token_ids])
    if banned:
        logits[tuple(zip(*banned, strict=True))] = -np.inf
    return logits


def _logprobs(own: Floats, tokens: Ints, draws: Sequence[Draw]) -> list[TokenLogprobs | None]:
    """How probable each token was, and the likeliest ones, in the distribution that the model itself gave."""
    out: list[TokenLogprobs | None] = [None] * len(draws)
    rows = [row for row, draw in enumerate(draws) if draw.sampling.logprobs is not None]
    if not rows:
        return out
    logits = own if len(rows) == len(own) else own[rows]
    sums = weigh(logits, np.ones(len(rows))).sum(axis=2).sum(axis=1, dtype=np.float64)
    scale = logits.max(axis=1).astype(np.float64) + np.log(sums)
    likeliest_ids, values = likeliest(logits, min(MAX_LOGPROBS, logits.shape[1]))
    order = np.argsort(-values, axis=1, kind="stable")
    ids = np.take_along_axis(likeliest_ids, order, axis=1)
    scores = np.take_along_axis(values, order, axis=1) - scale[:, None]
    own_scores = logits[np.arange(len(rows)), tokens[rows]] - scale
    for row, score, top_ids, top_scores in zip(rows, own_scores.tolist(), ids, scores, strict=True):
        num = min(draws[row].sampling.logprobs or 0, logits.shape[1])
        out[row] = TokenLogprobs(score, tuple(zip(top_ids[:num].tolist(), top_scores[:num].tolist(), strict=True)))
    return out


def _failure(draw: Draw) -> InternalError:
    return InternalError(f"non-finite logits at position {draw.position}, or none that may be drawn")
