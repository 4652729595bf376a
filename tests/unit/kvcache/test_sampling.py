"""The one check of sampling parameters (row 24 of the fault catalogue)."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.errors import BadArgument
from bus.messages import Generate, PromptKind, Sampling
from bus.wire import decode, describe, encode
from kvcache.sampling import SamplingParams, check_sampling

BAD: list[tuple[str, Any]] = [
    *[("max_tokens", value) for value in (0, -1, 1_000_001, True, 1.0, "5", None, 10**5000)],
    *[("min_tokens", value) for value in (-1, 129, False, 1.5, 1_000_001)],
    *[("temperature", value) for value in (-0.1, math.nan, math.inf, -math.inf, 100.1, True, "hot", None, 10**400)],
    *[("top_p", value) for value in (0, -1, 1.01, math.nan, math.inf, None)],
    *[("top_k", value) for value in (-1, 1_000_001, True, 0.5)],
    *[("seed", value) for value in (-1, 2**63, True, 1.0)],
    *[("stop", value) for value in (["a"] * 17, [""], "", ["a" * 257], [5], [b"x"], 7, {"a"}, ["\ud800"])],
    ("stop", ["\U0001f600" * 256] * 5),
    *[("stop_token_ids", value) for value in ([1] * 65, [-1], [2**32], [True], ["1"], 5, None)],
    *[("ignore_eos", value) for value in (1, 0, None, "yes")],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{case}" for case, (name, _) in enumerate(BAD)])
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:  # noqa: ANN401  # wrong on purpose
    with pytest.raises(BadArgument) as caught:
        SamplingParams(**{name: value})
    assert name.split("_")[0] in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "wrong",
    [
        Sampling(max_tokens=0),
        Sampling(min_tokens=5, max_tokens=4),
        Sampling(temperature=math.nan),
        Sampling(top_p=0.0),
        Sampling(top_k=-3),
        Sampling(seed=-1),
        Sampling(stop=("a",) * 17),
        Sampling(stop_token_ids=(2**40,)),
    ],
    ids=repr,
)
def test_a_worker_refuses_what_a_careless_client_sends(wrong: Sampling) -> None:
    with pytest.raises(BadArgument):
        check_sampling(wrong)


def test_good_values_become_the_message_with_the_seed_asked_for_or_a_random_one() -> None:
    params = SamplingParams(max_tokens=7, min_tokens=7, temperature=0, top_k=3, stop="end", stop_token_ids=[1, 2])
    wanted = Sampling(7, 7, 0.0, 1.0, 3, 99, ("end",), (1, 2), False)
    assert params.with_seed(99) == wanted
    assert SamplingParams(seed=5).with_seed(99).seed == 5
    assert isinstance(params.with_seed(1).temperature, float)


sampling = st.builds(
    Sampling,
    max_tokens=st.integers(-3, 1_000_003),
    min_tokens=st.integers(-3, 1_000_003),
    temperature=st.floats(),
    top_p=st.floats(),
    top_k=st.integers(-3, 2**40),
    seed=st.integers(-3, 2**63 - 1),
    stop=st.lists(st.text(max_size=300), max_size=20).map(tuple),
    stop_token_ids=st.lists(st.integers(-3, 2**33), max_size=70).map(tuple),
    ignore_eos=st.booleans(),
)


@given(sampling)
def test_what_passes_is_in_range_and_fits_into_a_message(candidate: Sampling) -> None:
    try:
        check_sampling(candidate)
    except BadArgument:
        return
    assert 0 <= candidate.min_tokens <= candidate.max_tokens <= 1_000_000
    assert math.isfinite(candidate.temperature)
    assert candidate.temperature >= 0
    assert 0 < candidate.top_p <= 1
    assert candidate.top_k >= 0
    request = Generate(
        req_id=bytes(16),
        attempt=0,
        deadline_ms=1,
        stream_id=bytes(16),
        epoch=0,
        kind=PromptKind.TEXT,
        sampling=candidate,
        payload=describe([b"x"]),
    )
    assert decode([encode(request), b"x"]).message.sampling == candidate
