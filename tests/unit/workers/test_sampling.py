from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import InternalError
from bus.messages import Sampling
from workers.batch import BlockId, Draw, Drawn, Scored, Slice
from workers.draws import uniform
from workers.sampling import results, score
from workers.sampling import sample as sample_drawn

VECTORS = [0.011546754286331562, 0.3035680343067586, 0.5023796042735054, 0.1653810847067234]
TOKENS = [96, 83, 97, 67, 99, 99, 96, 84]


def draw_of(position: int = 0, banned_ids: tuple[int, ...] = (), **parameters: Any) -> Draw:
    return Draw(sampling=Sampling(**parameters), position=position, banned_ids=banned_ids)


def sample(logits: torch.Tensor, draws: list[Draw]) -> list[int | InternalError]:
    """The tokens alone."""
    return [drawn.token_id if isinstance(drawn, Drawn) else drawn for drawn in sample_drawn(logits, draws)]


def draw_many(logits: list[float], count: int, **parameters: Any) -> Counter[int | InternalError]:
    rows = torch.tensor(logits).repeat(count, 1)
    return Counter(sample(rows, [draw_of(position, **parameters) for position in range(count)]))


def test_temperature_zero_takes_the_likeliest_and_the_first_of_equals() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 0.0]])
    assert sample(logits, [draw_of(temperature=0.0)] * 2) == [1, 0]


def test_same_seed_and_position_draw_the_same_token_in_any_batch() -> None:
    torch.manual_seed(0)
    rows = torch.randn(20, 500)
    draws = [draw_of(position, seed=position % 3) for position in range(20)]
    together = sample(rows.clone(), draws)
    apart = [sample(rows[i : i + 1].clone(), draws[i : i + 1])[0] for i in reversed(range(20))]
    assert together == apart[::-1]


def test_rows_drawn_together_are_drawn_as_if_apart_whatever_their_parameters() -> None:
    torch.manual_seed(1)
    rows = torch.randn(60, 3000).mul(4).round()  # rounded, for ties at every edge
    rows[7, 5] = math.nan
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.8},
    ]
    draws = [
        draw_of(n, (3, n) if n % 4 == 0 else (), seed=n % 7, **ways[n % 3 if n < 30 else n % 5]) for n in range(60)
    ]
    together = sample(rows.clone(), draws)
    apart = [sample(rows[n : n + 1].clone(), draws[n : n + 1])[0] for n in range(60)]
    assert [str(token) for token in together] == [str(token) for token in apart]
    assert sum(isinstance(token, InternalError) for token in together) == 1


def test_seed_means_what_it_always_meant() -> None:
    """Changing these numbers changes what a user's seed gives: a new major version."""
    assert [uniform(0, 0), uniform(1, 0), uniform(0, 1), uniform(2**63 - 1, 10**6)] == pytest.approx(VECTORS, abs=0)
    rows = torch.linspace(-2, 2, 100).repeat(8, 1)
    draws = [draw_of(position, seed=42, top_k=50, top_p=0.9) for position in range(8)]
    assert sample(rows, draws) == TOKENS


def test_uniform_numbers_of_neighbouring_positions_are_spread_evenly() -> None:
    numbers = [uniform(7, position) for position in range(4000)]
    assert min(numbers) >= 0.0
    assert max(numbers) < 1.0
    assert sum(numbers) / 4000 == pytest.approx(0.5, abs=0.02)
    both_low = sum(a < 0.5 and b < 0.5 for a, b in pairwise(numbers))
    assert both_low / 4000 == pytest.approx(0.25, abs=0.03)


def test_tokens_come_as_often_as_their_probability() -> None:
    counts = draw_many([math.log(p) for p in (0.5, 0.3, 0.15, 0.05)], 4000)
    for token, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_low_temperature_sharpens_and_high_temperature_flattens() -> None:
    logits = [2.0, 1.0, 0.0]
    assert draw_many(logits, 500, temperature=0.05)[0] == 500
    assert min(draw_many(logits, 3000, temperature=50.0).values()) > 900


def test_top_k_keeps_the_likeliest_and_lower_ids_of_equals() -> None:
    assert set(draw_many([1.0, 3.0, 3.0, 3.0, 0.0], 300, top_k=2)) == {1, 2}
    assert set(draw_many([5.0, 1.0, 1.0, 1.0], 300, top_k=2, temperature=9.0)) == {0, 1}


def test_top_k_larger_than_the_vocabulary_keeps_all() -> None:
    assert set(draw_many([0.0, 0.0, 0.0], 300, top_k=50)) == {0, 1, 2}


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = [math.log(p) for p in (0.2, 0.5, 0.3)]
    assert set(draw_many(logits, 300, top_p=0.5)) == {1}
    assert set(draw_many(logits, 300, top_p=0.51)) == {1, 2}
    assert set(draw_many(logits, 300, top_p=0.81)) == {0, 1, 2}
    assert set(draw_many(logits, 50, top_p=1e-9)) == {1}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    """0.4 + 0.3 of 0.9 reach 0.75 once the rest is renormalised, of 1 they would not."""
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert set(draw_many(logits, 300, top_k=3, top_p=0.75)) == {0, 1}


def test_top_p_over_a_flat_vocabulary_needs_more_than_its_first_guess() -> None:
    """5,000 tokens a hair apart: the likeliest 1,024 hold a fifth of the probability."""
    rows = torch.linspace(0.01, 0.0, 5000).repeat(60, 1)
    tokens = sample(rows, [draw_of(position, top_p=0.45) for position in range(60)])
    assert 1500 < max(token for token in tokens if isinstance(token, int)) < 2260


def test_banned_token_never_comes_not_even_greedily() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]]).repeat(50, 1)
    draws = [draw_of(position, banned_ids=(0,), temperature=float(position % 2)) for position in range(50)]
    assert 0 not in sample(logits, draws)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_fail_their_own_row_only(bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, bad], [1.0, 0.0]])
    first, broken, last = sample(logits, [draw_of(temperature=0.0), draw_of(position=17), draw_of(temperature=0.0)])
    assert (first, last) == (1, 0)
    assert isinstance(broken, InternalError)
    assert "position 17" in str(broken)


def test_rows_and_draws_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 draws"):
        sample(torch.zeros(2, 3), [draw_of()])


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.01, 100.0),
    position=st.integers(0, 2**40),
    seed=st.integers(0, 2**63 - 1),
)
def test_drawn_token_is_always_one_that_the_cuts_leave(
    logits: list[float], top_k: int, top_p: float, temperature: float, position: int, seed: int
) -> None:
    (token,) = sample(
        torch.tensor([logits]), [draw_of(position, top_k=top_k, top_p=top_p, temperature=temperature, seed=seed)]
    )
    assert isinstance(token, int)
    if top_k:
        assert sum(value > logits[token] for value in logits) < top_k
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    kept = sorted(weights, reverse=True)[: top_k or None]
    likelier = sum(weight for weight in kept if weight > weights[token] * (1 + 1e-9))
    assert likelier / sum(kept) <= top_p + 1e-6


# --- prompts that are scored ---------------------------------------------------------------------


def test_a_prompts_tokens_have_the_logprobs_of_the_models_own_distribution() -> None:
    torch.manual_seed(2)
    logits = torch.randn(70, 500) * 5
    targets = torch.randint(0, 500, (70,)).tolist()
    exact = logits.double().log_softmax(1)
    scores = score(logits, targets, 3)
    assert scores is not None
    assert [entry.logprob for entry in scores] == pytest.approx(exact[range(70), targets].tolist(), abs=1e-5)
    assert [[token for token, _ in entry.top] for entry in scores] == exact.topk(3).indices.tolist()
    likeliest = logits.argmax(1).tolist()
    assert all(entry.logprob == entry.top[0][1] for entry in score(logits, likeliest, 1) or ()), "the very same number"
    assert [entry.top for entry in score(logits, targets, 0) or ()] == [()] * 70


def test_each_slice_of_a_batch_gets_what_it_asked_for() -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, 50)
    pieces = [
        make_piece(1, wants_logits=True),
        make_piece(4, targets=(5, 6, 7, 8)),
        make_piece(9),
        make_piece(1, wants_logits=True, targets=()),
    ]
    greedy = draw_of(temperature=0.0)
    first, scored, nothing, last = results(logits, pieces, [greedy, None, None, greedy])
    assert (first, nothing, last) == (Drawn(int(logits[0].argmax())), None, Drawn(int(logits[5].argmax())))
    assert scored == Scored(score(logits[1:5], (5, 6, 7, 8), 0) or (), None)
    (both,) = results(logits[:3], [make_piece(3, wants_logits=True, targets=(1, 2))], [greedy])
    assert both == Scored(score(logits[:2], (1, 2), 0) or (), Drawn(int(logits[2].argmax())))


@pytest.mark.parametrize("row", [0, 3, 4], ids=["a prompt's", "its last", "the one to draw from"])
def test_a_number_that_is_none_fails_the_scored_slice_alone(row: int) -> None:
    logits = torch.zeros(6, 50)
    logits[row, 7] = math.nan
    pieces = [make_piece(5, wants_logits=True, targets=(1, 2, 3, 4)), make_piece(1, wants_logits=True)]
    bad, good = results(logits, pieces, [draw_of(temperature=0.0)] * 2)
    assert isinstance(bad, InternalError)
    assert good == Drawn(0)


def make_piece(num_tokens: int, *, wants_logits: bool = False, targets: tuple[int, ...] = ()) -> Slice:
    table = [BlockId(0)]
    return Slice(token_ids=(0,) * num_tokens, start=0, block_table=table, wants_logits=wants_logits, targets=targets)
