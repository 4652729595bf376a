"""Every cut and penalty against transformers' own processors, and the batch against its rows one by one."""

from __future__ import annotations

import math
from collections import Counter
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from bus.messages import Sampling
from workers.batch import Draw, Drawn
from workers.draws import GUESSES, uniform
from workers.logit_changes import changes_of
from workers.sampling import sample

PROMPT, OUTPUTS = (3, 7, 7, 1, 250), (9, 3, 9, 9, 40)


def draw_of(sampling: Sampling, position: int = 10, banned_ids: tuple[int, ...] = ()) -> Draw:
    return Draw(
        sampling=sampling,
        position=position,
        banned_ids=banned_ids,
        changes=changes_of(sampling, PROMPT, OUTPUTS),
    )


def tokens_of(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    drawn = sample(logits, draws)
    assert all(isinstance(each, Drawn) for each in drawn)
    return [each.token_id for each in drawn if isinstance(each, Drawn)]


def reference(logits: torch.Tensor, sampling: Sampling, position: int) -> int:
    """One row by transformers, drawn by walking over the probabilities in order of token id."""
    processors: list[LogitsProcessor] = []
    if sampling.logit_bias:
        bias: Any = {(token,): amount for token, amount in sampling.logit_bias}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature else []
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    ids: Any = torch.tensor([[*PROMPT, *OUTPUTS]])
    scores = LogitsProcessorList(processors)(ids, logits.unsqueeze(0).clone())[0]
    for token, count in Counter(OUTPUTS).items():  # as the OpenAI reference defines them
        scores[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    if sampling.temperature == 0:
        return int(scores.argmax())
    kept: Any = LogitsProcessorList(warpers)(ids, scores.double().unsqueeze(0))[0]
    probabilities = torch.softmax(kept, dim=0).tolist()
    target = uniform(sampling.seed, position)
    return next(token for token, reached in enumerate(accumulate(probabilities)) if reached > target)


CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 2000},
    {"top_p": 0.1},
    {"top_p": 0.6},
    {"top_p": 0.97, "temperature": 3.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 1e-5, "temperature": 4.0},
    {"top_k": 50, "top_p": 0.8},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.2, "temperature": 1.7},
]
CHANGES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 1.1},
    {"frequency_penalty": -2.0, "presence_penalty": -1.0},
    {"logit_bias": ((5, 8.0), (9, -100.0), (3, 2.5))},
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.7, "logit_bias": ((7, 3.0),)},
]


@pytest.mark.parametrize("vocab_size", [300, 4000, 20_000])
@pytest.mark.parametrize("parameters", CUTS + CHANGES, ids=str)
def test_tokens_are_those_that_transformers_processors_leave(parameters: dict[str, Any], vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(24, vocab_size, generator=generator) * 3
    samplings = [Sampling(**({"seed": row % 5} | parameters)) for row in range(24)]
    expected = [reference(logits[row], sampling, 10 + row) for row, sampling in enumerate(samplings)]
    before = logits.clone()
    assert tokens_of(logits, [draw_of(s, 10 + row) for row, s in enumerate(samplings)]) == expected
    assert torch.equal(logits, before)


@pytest.mark.parametrize("parameters", CHANGES, ids=str)
def test_the_likeliest_token_is_taken_after_the_penalties(parameters: dict[str, Any]) -> None:
    logits = torch.randn(24, 300, generator=torch.Generator().manual_seed(6))
    sampling = Sampling(temperature=0.0, **parameters)
    assert tokens_of(logits, [draw_of(sampling)] * 24) == [reference(row, sampling, 10) for row in logits]


def test_a_bias_changes_what_comes_and_a_penalty_takes_it_back() -> None:
    logits = torch.zeros(1, 300)
    assert tokens_of(logits, [draw_of(Sampling(temperature=0.0, logit_bias=((9, 5.0),)))]) == [9]
    taken_back = Sampling(temperature=0.0, logit_bias=((9, 5.0), (8, 0.1)), frequency_penalty=2.0)
    assert tokens_of(logits, [draw_of(taken_back)]) == [8], "9 came three times already"


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 1e-9, 0.05, 0.7, 1.0, 30.0]),
    top_k=st.sampled_from([0, 1, 5, 1500, 10**6]),
    top_p=st.sampled_from([1e-9, 0.3, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.1, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.sampled_from([(), ((4, 2.0), (200, -3.0))]),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.sampled_from([None, 0, 3]),
)
batches = st.lists(st.tuples(samplings, st.integers(0, 5000), st.sampled_from([(), (2, 9)])), min_size=1, max_size=10)


@settings(deadline=None, max_examples=40)
@given(batches, st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 5.0]), st.sampled_from([260, 1024, 3000]))
def test_a_mixed_batch_draws_what_its_rows_draw_alone(
    batch: list[tuple[Sampling, int, tuple[int, ...]]], seed: int, spread: float, vocab_size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Rounded, for ties at every edge; without any spread all tokens are one tie.
    logits = torch.randn(len(batch), vocab_size, generator=generator).mul(4).round() * spread
    draws = [draw_of(sampling, position, banned) for sampling, position, banned in batch]
    together = sample(logits, draws)
    assert together == [sample(logits[row : row + 1], [draw])[0] for row, draw in enumerate(draws)]
    assert all(
        isinstance(drawn, Drawn) and drawn.token_id not in draw.banned_ids
        for drawn, draw in zip(together, draws, strict=True)
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 1.7},
        {"top_k": 12},
        {"top_p": 0.8},
        {"min_p": 0.02},
        {"top_k": 30, "top_p": 0.9, "temperature": 1.4},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_they_are_probable_by_chi_square(parameters: dict[str, Any]) -> None:
    """40 tokens, 8,000 draws with fixed seeds; a fair drawer is refused once in a thousand choices of these seeds."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2
    sampling = Sampling(**parameters)
    counts = Counter(
        token
        for seed in range(8)
        for token in tokens_of(
            logits.repeat(1000, 1),
            [Draw(sampling=Sampling(seed=seed, **parameters), position=position) for position in range(1000)],
        )
    )
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    nothing: Any = torch.zeros(1, 1, dtype=torch.int64)
    scores: Any = LogitsProcessorList(warpers)(nothing, logits.double().unsqueeze(0))
    expected = (torch.softmax(scores[0], dim=0) * 8000).numpy()
    common = expected >= 5
    assert sum(counts[int(token)] for token in np.flatnonzero(expected == 0)) == 0
    observed = np.array([counts[token] for token in range(40)], dtype=float)
    rest = (observed[~common].sum(), expected[~common].sum())
    terms = [*zip(observed[common], expected[common], strict=True), *([rest] if rest[1] >= 5 else [])]
    statistic = sum((seen - due) ** 2 / due for seen, due in terms)
    freedom = len(terms) - 1
    # Wilson and Hilferty's normal approximation of the 99.9 % point of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_a_nucleus_wider_than_every_guess_is_still_exact() -> None:
    """20,000 tokens a hair apart: nine tenths of them are far more than is looked at first."""
    logits = torch.linspace(0.01, 0.0, 20_000).repeat(50, 1)
    draws = [Draw(sampling=Sampling(top_p=0.9), position=position) for position in range(50)]
    tokens = tokens_of(logits, draws)
    assert max(GUESSES) < max(tokens) < 18_010
    assert tokens == [reference(logits[0], Sampling(top_p=0.9), position) for position in range(50)]


def test_logprobs_are_of_the_models_own_distribution_whatever_is_drawn_from() -> None:
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(3)) * 4
    changed = Sampling(temperature=0.2, top_k=5, repetition_penalty=1.9, logit_bias=((77, 90.0),), logprobs=4)
    plain = Sampling(temperature=0.0, logprobs=20)
    draws = [draw_of(changed), draw_of(plain), draw_of(Sampling(temperature=0.0)), draw_of(plain, banned_ids=(5,))] + [
        draw_of(Sampling(logprobs=0, seed=seed)) for seed in range(2)
    ]
    expected = torch.log_softmax(logits.double(), dim=1)
    for row, (drawn, draw) in enumerate(zip(sample(logits, draws), draws, strict=True)):
        assert isinstance(drawn, Drawn)
        if draw.sampling.logprobs is None:
            assert drawn.logprobs is None
            continue
        assert drawn.logprobs is not None
        assert drawn.logprobs.logprob == pytest.approx(float(expected[row, drawn.token_id]), abs=1e-5)
        best = torch.topk(expected[row], draw.sampling.logprobs)
        assert [token for token, _ in drawn.logprobs.top] == best.indices.tolist()
        assert [logprob for _, logprob in drawn.logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_equally_likely_alternatives_come_in_order_of_id_and_no_more_than_there_are() -> None:
    tied = Draw(sampling=Sampling(temperature=0.0, logprobs=3), position=0)
    (drawn,) = sample(torch.zeros(1, 900), [tied])
    assert isinstance(drawn, Drawn)
    assert drawn.logprobs is not None
    assert [token for token, _ in drawn.logprobs.top] == [0, 1, 2]
    (few,) = sample(torch.zeros(1, 2), [tied])
    assert isinstance(few, Drawn)
    assert few.logprobs is not None
    assert [token for token, _ in few.logprobs.top] == [0, 1]


def test_a_row_all_of_whose_tokens_are_banned_fails_alone() -> None:
    logits = torch.zeros(3, 2)
    draws = [Draw(sampling=Sampling(), position=0, banned_ids=banned) for banned in ((0,), (0, 1), (1,))]
    first, none, last = sample(logits, draws)
    assert (first, last) == (Drawn(1), Drawn(0))
    assert isinstance(none, Exception)
