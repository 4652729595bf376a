"""Draw the next token from logits, so that the same request at the same position always draws the same one.

Randomness is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): Philox keyed
by the request's seed, with the token's position as the counter, gives one uniform number. Nothing is carried
from token to token, so a stream that resumes on another worker goes on as it would have here.

The distribution is cut in the usual order, temperature, then top-k, then top-p (Holtzman et al. 2020), and
then walked in order of token id until the uniform number is used up. Both orders are part of the contract:
changing either changes what a seed means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bus.errors import InternalError
from bus.messages import Sampling
from workers.batch import Draw

NUCLEUS_GUESS = 1024
"""Likeliest tokens looked at first for top-p, before a sort of the whole vocabulary."""


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int | InternalError]:
    """One token for each row, or the error of that row alone.

    logits: [num_draws, vocab_size] float32, any device; rows with banned ids are changed in place.
    A row with a NaN or an infinity gives InternalError, since any token drawn from it would be noise.
    Rows of like parameters are drawn together; that changes no draw.
    """
    if logits.shape[0] != len(draws):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(draws)} draws")
    # A NaN passes through both ends and an infinity is one of them; `isfinite` of all would take ten times as long.
    lowest, highest = logits.amin(dim=1), logits.amax(dim=1)
    finite = (lowest.isfinite() & highest.isfinite()).tolist()
    for row, draw in enumerate(draws):
        if draw.banned_ids:
            logits[row, list(draw.banned_ids)] = float("-inf")
    tokens: list[int | InternalError] = [
        InternalError(f"non-finite logits at position {draw.position}") for draw in draws
    ]
    for sampling, rows in _alike(draws, finite):
        chosen = logits if len(rows) == len(draws) else logits[rows]
        if sampling.temperature == 0.0:
            drawn = chosen.max(dim=1).indices.tolist()
        else:
            drawn = _draw(chosen.to("cpu"), sampling, [draws[row] for row in rows])
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
    return tokens


def _alike(draws: Sequence[Draw], finite: Sequence[bool]) -> Iterator[tuple[Sampling, list[int]]]:
    """The rows with numbers in them, by what shapes their distribution; with one of the samplings of each."""
    groups: dict[tuple[float, int, float], list[int]] = {}
    for row, draw in enumerate(draws):
        if finite[row]:
            greedy, sampling = draw.sampling.temperature == 0.0, draw.sampling
            key = (0.0, 0, 1.0) if greedy else (sampling.temperature, sampling.top_k, sampling.top_p)
            groups.setdefault(key, []).append(row)
    return ((draws[rows[0]].sampling, rows) for rows in groups.values())


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: 53 bits of a Philox 4x64-10 word.

    numpy promises the stream of raw words, not that of its floats; it counts up once before the first word.
    """
    word = np.random.Philox(key=seed, counter=[position, 0, 0, 0]).random_raw()
    return float(int(word) >> 11) * 2.0**-53


def _draw(logits: torch.Tensor, sampling: Sampling, draws: Sequence[Draw]) -> list[int]:
    """A token for each row, all of which have the temperature, top_k and top_p of `sampling`."""
    if 0 < sampling.top_k < logits.shape[1]:
        tokens: list[int] = []
        for row, ids, draw in zip(logits, _top_k_ids(logits, sampling.top_k), draws, strict=True):
            tokens += _walk(row[ids].unsqueeze(0), sampling, [draw], ids)
        return tokens
    return _walk(logits, sampling, draws, torch.arange(logits.shape[1]))


def _walk(logits: torch.Tensor, sampling: Sampling, draws: Sequence[Draw], ids: torch.Tensor) -> list[int]:
    """Draw from the tokens `ids`, whose logits are the columns, after cutting at top_p."""
    # float64 on the CPU from here on, so that the walk over 50,000 tokens adds up, and the same everywhere.
    probabilities = torch.softmax(logits.to(torch.float64) / sampling.temperature, dim=1)
    if sampling.top_p >= 1.0:
        return _use_up(probabilities, draws, ids)
    tokens: list[int] = []
    for row, draw in zip(probabilities, draws, strict=True):
        kept = _nucleus(row, sampling.top_p)
        tokens += _use_up(row[kept].unsqueeze(0), [draw], ids[kept])
    return tokens


def _use_up(probabilities: torch.Tensor, draws: Sequence[Draw], ids: torch.Tensor) -> list[int]:
    """Walk each row in order of token id until its uniform number is used up."""
    cumulative = torch.cumsum(probabilities, dim=1)
    numbers = torch.tensor([uniform(draw.sampling.seed, draw.position) for draw in draws], dtype=torch.float64)
    targets = numbers * cumulative[:, -1]
    at = torch.searchsorted(cumulative, targets.unsqueeze(1), right=True).squeeze(1)
    # `right` skips tokens of probability 0; the last sum may round below a target that is all but 1.
    drawn: list[int] = ids[at.clamp_(max=len(ids) - 1)].tolist()
    return drawn


def _top_k_ids(logits: torch.Tensor, top_k: int) -> list[torch.Tensor]:
    """Per row the ids of its `top_k` likeliest, ties at the edge to the lower id, in order of id."""
    edges = torch.topk(logits, top_k, dim=1).values[:, -1:]
    return [_cut(row, edge, top_k) for row, edge in zip(logits, edges, strict=True)]


def _cut(row: torch.Tensor, edge: torch.Tensor, top_k: int) -> torch.Tensor:
    candidates = torch.nonzero(row >= edge).squeeze(1)
    if len(candidates) == top_k:
        return candidates
    is_above = row[candidates] > edge
    above, tied = candidates[is_above], candidates[~is_above]
    return torch.cat((above, tied[: top_k - len(above)])).sort().values


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Indices, ascending, of the smallest set of likeliest tokens whose probabilities reach `top_p`; never empty."""
    ordered, candidates = _descending(probabilities, NUCLEUS_GUESS)
    reached = torch.cumsum(ordered, dim=0)
    if float(reached[-1]) < top_p:
        ordered, candidates = _descending(probabilities, len(probabilities))
        reached = torch.cumsum(ordered, dim=0)
    size = int(torch.searchsorted(reached, top_p)) + 1
    return candidates[:size].sort().values


def _descending(probabilities: torch.Tensor, at_least: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `at_least` likeliest and all that equal the last of them, with their indices, lower ids first of equals."""
    edge = torch.topk(probabilities, min(at_least, len(probabilities))).values[-1]
    candidates = torch.nonzero(probabilities >= edge).squeeze(1)
    ordered, order = torch.sort(probabilities[candidates], descending=True, stable=True)
    return ordered, candidates[order]
