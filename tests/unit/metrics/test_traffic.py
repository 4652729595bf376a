"""What a gateway counts of generations, from the events that pass."""

from __future__ import annotations

from bus.errors import ErrorCode, Overloaded
from kvcache.client.results import Done, Event, Start, Timings, Token, Usage
from kvcache.metrics.families import Buckets, Histogram, capped
from kvcache.metrics.traffic import MAX_MODELS, Traffic


def start(index: int = 0, model: str = "m") -> Start:
    return Start("w", "because", model, 10, 4, index=index)


def token(index: int = 0) -> Token:
    return Token(0, 7, "a", index)


def done(num_tokens: int, index: int = 0, resumes: int = 0) -> Done:
    timings = Timings(0.0, 0.0, 0.0, queue_ms=100.0, prefill_ms=200.0, decode_ms=300.0, resumes=resumes)
    return Done("", "length", Usage(10, 4, num_tokens), timings, "w", "because", "r", index)


def value(traffic: Traffic, name: str, *labels: str) -> float:
    found = dict(family(traffic, name))[labels]
    assert not isinstance(found, Buckets)
    return found


def histogram(traffic: Traffic, name: str, model: str = "m") -> tuple[int, float]:
    """How many values, and their sum, without the last digits."""
    found = dict(family(traffic, name))[(model,)]
    assert isinstance(found, Buckets)
    return found.counts[-1], round(found.total, 9)


def family(traffic: Traffic, name: str) -> list[tuple[tuple[str, ...], float | Buckets]]:
    (found,) = [one for one in traffic.families() if one.name == name]
    return found.samples


def test_times_of_one_generation_are_those_between_its_events() -> None:
    traffic = Traffic()
    watch = traffic.watch(1, now=10.0)
    watch.saw([start()], 10.2)
    watch.saw([token()], 10.5)
    watch.saw([token()], 10.6)
    watch.saw([token(), token()], 10.9)
    watch.saw([done(4, resumes=2)], 11.0)
    assert histogram(traffic, "time_to_first_token_seconds") == (1, 0.5)
    assert histogram(traffic, "inter_token_latency_seconds") == (3, 0.4)
    assert histogram(traffic, "request_time_per_output_token_seconds") == (1, round(0.4 / 3, 9))
    assert histogram(traffic, "e2e_request_latency_seconds") == (1, 1.0)
    assert histogram(traffic, "request_queue_time_seconds") == (1, 0.1)
    assert histogram(traffic, "request_inference_time_seconds") == (1, 0.5)
    assert histogram(traffic, "request_prompt_tokens") == (1, 10)
    assert histogram(traffic, "request_generation_tokens") == (1, 4)
    assert value(traffic, "prompt_tokens", "m") == 10
    assert value(traffic, "cached_prompt_tokens", "m") == 4
    assert value(traffic, "generation_tokens", "m") == 4
    assert value(traffic, "stream_resumes", "m") == 2
    assert value(traffic, "request_success", "m", "length") == 1
    assert value(traffic, "request_success", "m", "stop") == 0


def test_tokens_that_come_with_the_first_one_took_no_time_of_their_own() -> None:
    traffic = Traffic()
    watch = traffic.watch(1, now=0.0)
    watch.saw([start(), token(), token(), token(), done(3)], 2.0)
    assert histogram(traffic, "time_to_first_token_seconds") == (1, 2.0)
    assert histogram(traffic, "inter_token_latency_seconds") == (2, 0.0)


def test_outputs_of_one_request_are_timed_apart() -> None:
    traffic = Traffic()
    watch = traffic.watch(2, now=0.0)
    watch.saw([start(0), start(1), token(0)], 1.0)
    watch.saw([token(1), token(0)], 3.0)
    assert histogram(traffic, "time_to_first_token_seconds") == (2, 4.0)
    assert histogram(traffic, "inter_token_latency_seconds") == (1, 2.0)
    assert value(traffic, "gateway_outputs_running") == 2
    watch.saw([done(1, 1)], 3.0)
    assert value(traffic, "gateway_outputs_running") == 1


def test_what_has_not_ended_when_a_request_is_left_is_counted_once_as_cancelled() -> None:
    traffic = Traffic()
    watch = traffic.watch(3, now=0.0)
    watch.saw([start(1), token(1), done(1, 1)], 1.0)
    watch.closed()
    watch.closed()
    assert value(traffic, "request_failures", "CANCELLED") == 2
    assert value(traffic, "gateway_outputs_running") == 0


def test_a_failure_counts_under_its_code_and_not_as_cancelled_too() -> None:
    traffic = Traffic()
    watch = traffic.watch(1, now=0.0)
    watch.failed(Overloaded("full"))
    watch.closed()
    assert value(traffic, "request_failures", "OVERLOADED") == 1
    assert sum(value(traffic, "request_failures", code.name) for code in ErrorCode) == 1


def test_models_beyond_the_limit_share_one_label() -> None:
    traffic = Traffic()
    events: list[Event] = [token(), done(1)]
    for number in range(MAX_MODELS + 3):
        traffic.watch(1, now=0.0).saw([start(model=f"m{number:03}"), *events], 1.0)
    labels = [at for at, _ in family(traffic, "generation_tokens")]
    assert len(labels) == MAX_MODELS + 1
    assert value(traffic, "generation_tokens", "other") == 3


def test_a_value_belongs_to_the_first_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram((1, 2))
    for seen in (0.5, 1.0, 1.5, 2.0, 2.0 + 2**-40):
        histogram.observe(seen)
    histogram.observe(9, times=2)
    assert histogram.buckets() == Buckets((2, 4, 7), (1, 2, float("inf")), 25.0 + 2**-40)


def test_the_least_counts_are_put_together_beyond_a_cap() -> None:
    assert capped({"a": 3, "b": 1, "c": 5, "d": 1}, 2) == {"a": 3, "c": 5, "other": 2}
    assert capped({"a": 3, "b": 1}, 2) == {"a": 3, "b": 1}
    assert capped({"other": 9, "b": 1, "c": 1}, 2) == {"other": 10, "b": 1}
