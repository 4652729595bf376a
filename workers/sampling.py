"""Draw the next token from logits, so that the same request at the same position always draws the same one.

Randomness is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): Philox keyed
by the request's seed, with the token's position as the counter, gives one uniform number. Nothing is carried
from token to token, so a stream that resumes on another worker goes on as it would have here.

The distribution is cut in the usual order, temperature, then top-k, then top-p (Holtzman et al. 2020), and
then walked in order of token id until the uniform number is used up. Both orders are part of the contract:
changing either changes what a seed means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bus.errors import InternalError
from bus.messages import Sampling

NUCLEUS_GUESS = 1024
"""Likeliest tokens looked at first for top-p, before a sort of the whole vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """One row's request. `sampling` has been through `check_sampling`.

    position: of the token to be drawn, counted from the start of the prompt.
    banned_ids: tokens that may not come now (the end of text, while `min_tokens` is not reached).
    """

    sampling: Sampling
    position: int
    banned_ids: Sequence[int] = ()


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int | InternalError]:
    """One token for each row, or the error of that row alone.

    logits: [num_draws, vocab_size] float32, any device; rows with banned ids are changed in place.
    A row with a NaN or an infinity gives InternalError, since any token drawn from it would be noise.
    """
    if logits.shape[0] != len(draws):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(draws)} draws")
    finite = torch.isfinite(logits).all(dim=1).tolist()
    for row, draw in enumerate(draws):
        if draw.banned_ids:
            logits[row, list(draw.banned_ids)] = float("-inf")
    likeliest = logits.argmax(dim=1).tolist()
    tokens: list[int | InternalError] = []
    for row, draw in enumerate(draws):
        if not finite[row]:
            tokens.append(InternalError(f"non-finite logits at position {draw.position}"))
        elif draw.sampling.temperature == 0.0:
            tokens.append(likeliest[row])
        else:
            tokens.append(_draw_one(logits[row], draw))
    return tokens


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: 53 bits of a Philox 4x64-10 word.

    numpy promises the stream of raw words, not that of its floats; it counts up once before the first word.
    """
    word = np.random.Philox(key=seed, counter=[position, 0, 0, 0]).random_raw()
    return float(int(word) >> 11) * 2.0**-53


def _draw_one(row: torch.Tensor, draw: Draw) -> int:
    sampling = draw.sampling
    # float64 on the CPU from here on, so that the walk over 50,000 tokens adds up, and the same everywhere.
    scaled = row.to("cpu", torch.float64) / sampling.temperature
    ids, scaled = _keep_top_k(scaled, sampling.top_k)
    probabilities = torch.softmax(scaled, dim=0)
    if sampling.top_p < 1.0:
        kept = _nucleus(probabilities, sampling.top_p)
        ids, probabilities = ids[kept], probabilities[kept]
    cumulative = torch.cumsum(probabilities, dim=0)
    target = uniform(sampling.seed, draw.position) * float(cumulative[-1])
    at = int(torch.searchsorted(cumulative, target, right=True))
    # `right` skips tokens of probability 0; the last sum may round below a target that is all but 1.
    return int(ids[min(at, len(ids) - 1)])


def _keep_top_k(scaled: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logits of the `top_k` likeliest (0: of all), ties at the edge to the lower id, in order of id."""
    ids = torch.arange(scaled.shape[0])
    if not 0 < top_k < scaled.shape[0]:
        return ids, scaled
    edge = torch.topk(scaled, top_k).values[-1]
    above, tied = ids[scaled > edge], ids[scaled == edge]
    kept = torch.cat((above, tied[: top_k - len(above)])).sort().values
    return kept, scaled[kept]


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
