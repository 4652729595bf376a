"""The one check of sampling parameters (row 24 of the fault catalogue)."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from bus.errors import BadArgument
from bus.messages import Generate, PromptKind, Sampling
from bus.wire import decode, describe, encode
from kvcache.sampling import SamplingFields, SamplingParams, sampling_params
from kvcache.sampling_checks import check_sampling, check_vocabulary

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
    *[("n", value) for value in (0, 65, True, 1.0, None)],
    *[("min_p", value) for value in (-0.1, 1.1, math.nan, None, True)],
    *[("repetition_penalty", value) for value in (0, -1, 101, math.nan, math.inf, None)],
    *[("presence_penalty", value) for value in (2.1, -2.1, math.nan, "1")],
    *[("frequency_penalty", value) for value in (2.1, -2.1, math.nan, "1")],
    *[("logit_bias", value) for value in ({1: 101}, {1: math.nan}, {1: 10**400}, {1: None}, {1: True}, [(1, 2)], "x")],
    *[("logit_bias", value) for value in ({-1: 1}, {2**32: 1}, {"1": 1}, {True: 1}, dict.fromkeys(range(301), 1))],
    *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, 21, True, 1.0, "all")],
    *[("stop", value) for value in (["x"] * 1_000_000, "x" * 10**6)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{case}" for case, (name, _) in enumerate(BAD)])
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
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
        Sampling(repetition_penalty=0.0),
        Sampling(frequency_penalty=math.inf),
        Sampling(logit_bias=((1, math.nan),)),
        Sampling(logit_bias=((1, 1.0), (1, 2.0))),
        Sampling(logprobs=21),
        Sampling(prompt_logprobs=21),
    ],
    ids=repr,
)
def test_a_worker_refuses_what_a_careless_client_sends(wrong: Sampling) -> None:
    with pytest.raises(BadArgument):
        check_sampling(wrong)


def test_good_values_become_the_message_with_the_seed_asked_for_or_a_random_one() -> None:
    params = SamplingParams(max_tokens=7, min_tokens=7, temperature=0, top_k=3, stop="end", stop_token_ids=[1, 2])
    wanted = Sampling(7, 7, 0.0, 1.0, 3, 99, ("end",), (1, 2), False)
    assert params.messages(99) == (wanted,)
    assert SamplingParams(seed=5).messages(99)[0].seed == 5
    assert isinstance(params.messages(1)[0].temperature, float)


sampling = st.builds(
    Sampling,
    max_tokens=st.integers(0, 1_000_003),
    min_tokens=st.integers(-1, 50),
    temperature=st.floats(-0.1, 110) | st.just(math.nan),
    top_p=st.floats(-0.1, 1.1),
    top_k=st.integers(0, 2**20),
    seed=st.integers(-3, 2**63 - 1),
    stop=st.lists(st.text(max_size=260), max_size=17).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2**32), max_size=66).map(tuple),
    ignore_eos=st.booleans(),
    min_p=st.floats(-0.1, 1.1),
    repetition_penalty=st.floats(0.0, 3.0),
    presence_penalty=st.floats(-2.1, 2.1),
    frequency_penalty=st.floats(-2.1, 2.1),
    logit_bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(-100, 100), max_size=310).map(
        lambda biases: tuple(biases.items())
    ),
    logprobs=st.none() | st.integers(-1, 22),
    prompt_logprobs=st.none() | st.integers(-1, 22),
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


def test_the_largest_lists_that_pass_fit_into_a_message_and_no_larger_ones_pass() -> None:
    """With a chain and the longest names of plain letters that a header then still has room for."""
    stop, ids = ["x" * 128] * 12, list(range(2**32 - 64, 2**32))
    most = (6144 - 12 * 131 - 64 * 5) // 15
    biases = dict.fromkeys(range(2**32 - most - 1, 2**32 - 1), 99.9)
    [sampling] = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=biases).messages(2**63 - 1)
    request = Generate(
        req_id=bytes(16),
        attempt=0,
        deadline_ms=1,
        stream_id=bytes(16),
        epoch=0,
        kind=PromptKind.MESSAGES,
        sampling=sampling,
        model="m" * 256,
        seq_id="s" * 256,
        cache_salt="c" * 256,
        chain=(bytes(8),) * 64,
        payload=describe([b"x", b"y"]),
    )
    assert decode([encode(request), b"x", b"y"]).message == request
    with pytest.raises(BadArgument, match="bytes together"):
        SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=biases | {1: 1.0})


def test_several_outputs_draw_with_seeds_one_apart_and_are_else_the_same() -> None:
    outputs = SamplingParams(n=3, seed=2**63 - 2, logit_bias={5: 1}).messages(0)
    assert [output.seed for output in outputs] == [2**63 - 2, 2**63 - 1, 0]
    assert {structs.replace(output, seed=0) for output in outputs} == {structs.replace(outputs[0], seed=0)}
    assert outputs[0].logit_bias == ((5, 1.0),)
    assert len({output.seed for output in SamplingParams(n=64).messages(7)}) == 64


def test_keywords_are_the_fields_of_the_object_and_win_over_it() -> None:
    assert get_type_hints(SamplingFields) == get_type_hints(SamplingParams)
    assert sampling_params(None, {"top_k": 3}) == SamplingParams(top_k=3)
    params = SamplingParams(top_k=3, seed=1)
    assert sampling_params(params, {}) == params
    assert sampling_params(params, {"top_k": 4}) == SamplingParams(top_k=4, seed=1)
    with pytest.raises(BadArgument, match="SamplingParams"):
        sampling_params({"top_k": 3}, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="best_of"):
        sampling_params(None, {"best_of": 3})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize(
    "wrong",
    [Sampling(stop_token_ids=(1, 100)), Sampling(logit_bias=((0, 1.0), (100, 1.0)))],
    ids=["stop_token_ids", "logit_bias"],
)
def test_token_ids_are_held_to_the_models_vocabulary(wrong: Sampling) -> None:
    check_vocabulary(wrong, 101)
    with pytest.raises(BadArgument, match="token id 100; this model's are 0 to 99"):
        check_vocabulary(wrong, 100)
