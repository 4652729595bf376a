"""transformers' GenerationConfig as ours: translated, harmless, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from bus.errors import BadArgument
from kvcache.sampling import SamplingParams


def config(**settings: Any) -> GenerationConfig:
    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


def test_every_setting_with_a_counterpart_is_translated() -> None:
    theirs = config(
        max_new_tokens=9,
        min_new_tokens=2,
        do_sample=True,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        num_return_sequences=3,
        stop_strings=["END"],
        eos_token_id=[5, 6],
        sequence_bias={(7,): -1.5},
        num_beams=1,
        pad_token_id=0,
    )
    ours = SamplingParams(
        n=3,
        max_tokens=9,
        min_tokens=2,
        temperature=0.7,
        top_k=40,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        stop=["END"],
        stop_token_ids=[5, 6],
        logit_bias={7: -1.5},
    )
    assert SamplingParams.from_generation_config(theirs) == ours


def test_without_do_sample_the_likeliest_token_is_taken_whatever_else_is_set() -> None:
    assert SamplingParams.from_generation_config(config()) == SamplingParams(temperature=0.0)
    assert SamplingParams.from_generation_config({"temperature": 2.0, "top_k": 9}) == SamplingParams(temperature=0.0)


def test_sampling_has_the_top_k_that_generate_has_and_one_end_of_text_is_enough() -> None:
    theirs = {"do_sample": True, "eos_token_id": 2, "max_length": 20}
    assert SamplingParams.from_generation_config(theirs) == SamplingParams(top_k=50, stop_token_ids=[2])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_beams", 4),
        ("no_repeat_ngram_size", 3),
        ("typical_p", 0.9),
        ("bad_words_ids", [[4]]),
        ("max_length", 100),
        ("max_time", 2.0),
        ("sequence_bias", {(1, 2): 3.0}),
        ("sequence_bias", 7),
        ("a_setting_of_next_year", 1),
    ],
)
def test_a_setting_without_a_counterpart_is_refused_by_name(setting: str, value: object) -> None:
    with pytest.raises(BadArgument, match=setting):
        SamplingParams.from_generation_config({setting: value})


def test_ranges_are_those_of_everybody() -> None:
    with pytest.raises(BadArgument, match="temperature"):
        SamplingParams.from_generation_config({"do_sample": True, "temperature": -1.0})


@pytest.mark.parametrize("wrong", [None, 5, "config", object()], ids=str)
def test_what_is_no_config_is_refused(wrong: object) -> None:
    with pytest.raises(BadArgument, match="GenerationConfig or a mapping"):
        SamplingParams.from_generation_config(wrong)
