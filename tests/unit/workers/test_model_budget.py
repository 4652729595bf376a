"""How memory is shared out between models: limits that hold, and refusals that say which flag would help."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import ModelUnavailable
from workers.model_budget import Grant, ModelBudget, ModelNeed

SMALL = ModelNeed(weights_bytes=300, block_bytes=10)


def test_models_named_at_start_have_equal_parts_in_whole_blocks() -> None:
    budget = ModelBudget(pools_bytes=1000, num_named=3)
    assert [budget.grant(name, SMALL) for name in "abc"] == [Grant(300, 330)] * 3


def test_a_model_that_nobody_named_takes_half_of_what_is_left_until_that_is_too_little() -> None:
    budget = ModelBudget(pools_bytes=800)
    grants = [budget.grant(name, SMALL) for name in "abcde"]
    assert [grant and grant.pool_bytes for grant in grants] == [400, 200, 100, 100, None]
    budget.release("b")
    assert budget.grant("e", SMALL) == Grant(300, 100)
    budget.check()


def test_without_a_limit_of_their_own_weights_are_not_counted() -> None:
    budget = ModelBudget(pools_bytes=800, num_named=1)
    assert budget.grant("a", ModelNeed(weights_bytes=1 << 50, block_bytes=10)) == Grant(1 << 50, 800)


def test_weights_and_pools_together_have_a_limit() -> None:
    budget = ModelBudget(pools_bytes=800, model_bytes=1000, num_named=2)
    assert budget.grant("a", SMALL) == Grant(300, 400)
    assert budget.grant("b", SMALL) is None
    assert budget.would_fit(SMALL, without=["a"])
    assert not budget.would_fit(SMALL, without=[])
    budget.release("a")
    assert budget.grant("b", SMALL) == Grant(300, 400)


def test_a_model_alone_takes_a_smaller_pool_if_its_weights_leave_no_more() -> None:
    budget = ModelBudget(pools_bytes=800, model_bytes=1000, num_named=1)
    assert budget.grant("a", ModelNeed(weights_bytes=945, block_bytes=10)) == Grant(945, 50)


@pytest.mark.parametrize(
    ("need", "flag"),
    [
        (ModelNeed(weights_bytes=991, block_bytes=10), "--model-memory-bytes"),
        (ModelNeed(weights_bytes=10, block_bytes=401), "--kv-cache-memory-bytes"),
    ],
)
def test_a_model_that_fits_not_even_alone_is_refused_with_the_flag_that_helps(need: ModelNeed, flag: str) -> None:
    budget = ModelBudget(pools_bytes=800, model_bytes=1000, num_named=2)
    budget.grant("a", SMALL)
    with pytest.raises(ModelUnavailable, match=flag):
        budget.grant("b", need)
    budget.check()


needs = st.builds(ModelNeed, weights_bytes=st.integers(0, 2000), block_bytes=st.integers(1, 200))


@given(
    pools_bytes=st.integers(1, 2000),
    model_bytes=st.none() | st.integers(1, 4000),
    num_named=st.integers(0, 4),
    events=st.lists(st.tuples(st.sampled_from("abcdef"), st.none() | needs), max_size=40),
)
def test_no_limit_is_ever_exceeded_and_what_would_fit_fits(
    pools_bytes: int, model_bytes: int | None, num_named: int, events: list[tuple[str, ModelNeed | None]]
) -> None:
    budget = ModelBudget(pools_bytes=pools_bytes, model_bytes=model_bytes, num_named=num_named)
    for name, need in events:
        if need is None or budget.granted(name) is not None:
            budget.release(name)
        else:
            fits = budget.would_fit(need, without=[])
            try:
                grant = budget.grant(name, need)
            except ModelUnavailable:
                assert not fits
            else:
                assert (grant is not None) == fits
                assert grant is None or (grant.pool_bytes > 0 and grant.pool_bytes % need.block_bytes == 0)
        budget.check()
