"""Draw tokens from many distributions at once, so that a seed and a position always mean the same token.

Randomness is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): Philox keyed by the
request's seed, with the token's position as the counter, gives one uniform number. Nothing is carried from token to
token, so a stream that resumes on another worker goes on as it would have here.

A distribution is cut in the order of transformers: temperature, then top-k, then top-p (Holtzman et al. 2020) of what
that left, then min-p (Nguyen et al. 2024). Each keeps the likeliest tokens, the lower id of equals, so together they
keep the likeliest `size` tokens, and the smallest size wins. What is kept is walked in order of token id until the
uniform number is used up. All these orders are part of the contract: changing one changes what a seed means.

No step is done row by row, and none depends on which other rows there are:

    logits [num_rows, vocab_size] --partition--> the likeliest 1,024 of each row, in order of id
                                  --sort--> how many of them are kept; rows for which these are too few: more of them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from workers.batch import Draw

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Flags = NDArray[np.bool_]

GUESSES = (1024, 8192)
"""How many of the likeliest tokens are looked at first and second, before a sort of the whole vocabulary."""
_UNKNOWN = np.iinfo(np.int64).max
_CHUNK = 256
_BLOCK_ROWS = 8  # as many as stay in a processor's cache while they are worked on
_GREEDY_BELOW = 1e-5
"""A temperature so low that dividing by it only loses digits; vLLM draws the line there too."""


def is_greedy(temperature: float) -> bool:
    """Whether the likeliest token is taken, and nothing drawn."""
    return temperature < _GREEDY_BELOW


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments: 53 bits of a Philox 4x64-10 word.

    numpy promises the stream of raw words, not that of its floats; it counts up once before the first word.
    """
    word = np.random.Philox(key=seed, counter=[position, 0, 0, 0]).random_raw()
    return float(int(word) >> 11) * 2.0**-53


def draw_tokens(logits: Floats, draws: Sequence[Draw]) -> Ints:
    """A token for each row, none of whose draws is greedy.

    logits: [num_rows, vocab_size] float32, finite but for -inf, which is never drawn, and at least one finite per row.
    """
    tokens = np.empty(len(draws), np.int64)
    for start in range(0, len(draws), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        tokens[block] = _draw_block(logits[block], _ways_of(draws[block], logits.shape[1]))
    return tokens


@dataclass(frozen=True, slots=True)
class _Ways:
    """How each row is drawn, as columns. top_k is the vocabulary's size where it is off."""

    temperature: Doubles
    top_k: Ints
    top_p: Doubles
    min_p: Doubles
    number: Doubles
    vocab_size: int

    @property
    def has_top_k(self) -> Flags:
        return self.top_k < self.vocab_size

    @property
    def is_cut(self) -> Flags:
        return self.has_top_k | (self.top_p < 1.0) | (self.min_p > 0.0)

    @property
    def needs_total(self) -> Flags:
        """Whether all of the vocabulary counts, and not only its likeliest tokens."""
        return ~self.is_cut | ((self.top_p < 1.0) & ~self.has_top_k)

    def of_rows(self, rows: Flags) -> _Ways:
        return _Ways(
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            number=self.number[rows],
            vocab_size=self.vocab_size,
        )


def _ways_of(draws: Sequence[Draw], vocab_size: int) -> _Ways:
    samplings = [draw.sampling for draw in draws]
    return _Ways(
        temperature=np.array([sampling.temperature for sampling in samplings]),
        top_k=np.array([min(sampling.top_k or vocab_size, vocab_size) for sampling in samplings], np.int64),
        top_p=np.array([sampling.top_p for sampling in samplings]),
        min_p=np.array([sampling.min_p for sampling in samplings]),
        number=np.array([uniform(draw.sampling.seed, draw.position) for draw in draws]),
        vocab_size=vocab_size,
    )


def _draw_block(logits: Floats, ways: _Ways) -> Ints:
    tokens = np.full(len(logits), -1, np.int64)
    totals = np.zeros(len(logits))
    weighed, is_cut = ways.needs_total, ways.is_cut
    if weighed.any():
        weights = weigh(_rows(logits, weighed), ways.temperature[weighed])
        sums = weights.sum(axis=2).astype(np.float64)
        totals[weighed] = sums.sum(axis=1)
        is_whole = ~is_cut[weighed]
        if is_whole.any():
            tokens[~is_cut] = _walk_chunks(_rows(weights, is_whole), sums[is_whole], ways.number[~is_cut])
    for num_likeliest in (*GUESSES, ways.vocab_size):
        left = (tokens < 0) & ((ways.top_k <= num_likeliest) | ~ways.has_top_k)
        if left.any():
            tokens[left] = _draw_cut(_rows(logits, left), ways.of_rows(left), totals[left], num_likeliest)
    return tokens


def _rows(array: NDArray[Any], rows: Flags) -> NDArray[Any]:
    """Those rows, copied only if they are not all."""
    return array if rows.all() else array[rows]


# --- distributions that are not cut --------------------------------------------------------------


def weigh(logits: Floats, temperature: Doubles) -> Floats:
    """Probabilities up to a factor, the likeliest token's being 1, in chunks: [num_rows, num_chunks, _CHUNK].

    float32 is exact enough for one token's; their sums are taken in float64 chunk by chunk.
    """
    num_rows, vocab_size = logits.shape
    weights = np.zeros((num_rows, -(-vocab_size // _CHUNK) * _CHUNK), np.float32)
    used = weights[:, :vocab_size]
    np.subtract(logits, logits.max(axis=1, keepdims=True), out=used)
    with np.errstate(over="ignore", under="ignore"):  # what is hopeless becomes -inf, then 0
        np.divide(used, temperature.astype(np.float32)[:, None], out=used)
        np.exp(used, out=used)
    return weights.reshape(num_rows, -1, _CHUNK)


def _walk_chunks(weights: Floats, sums: Doubles, number: Doubles) -> Ints:
    """Walk over the chunks' sums first, then over the tokens of the one where the number is used up."""
    reached = np.cumsum(sums, axis=1)
    target = number * reached[:, -1]
    chunk = _stop(reached, target)
    row = np.arange(len(chunk))
    inner = np.cumsum(weights[row, chunk], axis=1, dtype=np.float64)
    return chunk * _CHUNK + _stop(inner, target - (reached[row, chunk] - sums[row, chunk]))


def _stop(reached: Doubles, target: Doubles) -> Ints:
    """Where each walk stops: the first place beyond its target, but no further than the last that has any weight."""
    place = np.count_nonzero(reached <= target[:, None], axis=1)
    last = np.argmax(reached >= reached[:, -1:], axis=1)
    stop: Ints = np.minimum(place, last)
    return stop


# --- distributions that are cut ------------------------------------------------------------------


def _draw_cut(logits: Floats, ways: _Ways, totals: Doubles, num_likeliest: int) -> Ints:
    """A token for each row from its likeliest `num_likeliest`, or -1 if the cuts may keep more than those."""
    is_all = num_likeliest >= ways.vocab_size
    ids, values = likeliest(logits, min(num_likeliest, ways.vocab_size))
    ordered = -np.sort(-values, axis=1)
    highest, temperature = ordered[:, :1].astype(np.float64), ways.temperature[:, None]
    size = _num_kept(np.exp((ordered - highest) / temperature), ways, totals, is_all=is_all)

    edge = np.take_along_axis(ordered, np.minimum(size, values.shape[1])[:, None] - 1, axis=1)
    num_above = np.count_nonzero(ordered > edge, axis=1)
    is_edge = values == edge
    is_kept = (values > edge) | (is_edge & (np.cumsum(is_edge, axis=1) <= (size - num_above)[:, None]))
    reached = np.cumsum(np.where(is_kept, np.exp((values - highest) / temperature), 0.0), axis=1)
    place = _stop(reached, ways.number * reached[:, -1])
    drawn: Ints = np.take_along_axis(ids, place[:, None], axis=1)[:, 0]
    return drawn if is_all else np.where(size < _UNKNOWN, drawn, -1)


def likeliest(logits: Floats, num: int) -> tuple[Ints, Floats]:
    """Ids and logits of each row's `num` likeliest tokens and all that equal the last of them, in order of id.

    Both are [num_rows, width]; rows that have fewer are filled up with logits of -inf.
    """
    vocab_size = logits.shape[1]
    if num == vocab_size:
        return np.broadcast_to(np.arange(vocab_size), logits.shape), logits
    edge = np.partition(logits, vocab_size - num, axis=1)[:, vocab_size - num, None]
    row, token = np.divmod(np.flatnonzero(logits >= edge), vocab_size)  # `nonzero` takes ten times as long
    counts = np.bincount(row, minlength=len(logits))
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    ids = np.zeros((len(logits), counts.max()), np.int64)
    values = np.full(ids.shape, -np.inf, np.float32)
    ids[row, place] = token
    values[row, place] = logits[row, token]
    return ids, values


def _num_kept(weights: Doubles, ways: _Ways, totals: Doubles, *, is_all: bool) -> Ints:
    """How many of the likeliest tokens, whose weights are given in descending order, all cuts together leave.

    _UNKNOWN where that is more than are given. totals: the weight of the whole vocabulary, for rows that need it.
    """
    reached = np.cumsum(weights, axis=1)
    width = weights.shape[1]
    last = np.minimum(ways.top_k, width)[:, None] - 1
    total = np.take_along_axis(reached, last, axis=1)[:, 0]
    if not is_all:
        total = np.where(ways.has_top_k, total, totals)
    by_top_k = np.where(ways.has_top_k, ways.top_k, _UNKNOWN)
    short = np.count_nonzero(reached < (ways.top_p * total)[:, None], axis=1)
    by_top_p = np.where((ways.top_p < 1.0) & (short < width), short + 1, _UNKNOWN)
    likely = np.count_nonzero(weights >= ways.min_p[:, None], axis=1)
    is_known = likely < np.count_nonzero(weights > 0.0, axis=1)  # of its own tokens, not of what fills the row up
    by_min_p = np.where((ways.min_p > 0.0) & is_known, likely, _UNKNOWN)
    size = np.minimum(np.minimum(by_top_k, by_top_p), by_min_p)
    return np.minimum(size, width) if is_all else size
