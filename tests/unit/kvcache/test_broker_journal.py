"""What the broker tells of single requests: nothing, or in detail; and never what they hold."""

from __future__ import annotations

from bus import messages as m
from bus import wire
from bus.errors import InternalError
from bus.traces import TraceContext
from kvcache.broker.journal import News
from tests.unit.kvcache.broker_driver import PROMPT, Driver, done, generate, length, rid, stream_end


def detailed() -> Driver:
    driver = Driver(log_level="debug")
    driver.join_worker(b"w1", "w")
    driver.join_client()
    driver.core.take_news()
    return driver


def test_a_request_is_told_where_it_goes_and_how_it_ends_under_its_label() -> None:
    driver = detailed()
    driver.client(b"c1", generate(driver.open_stream(), label="chat 7"), PROMPT)
    driver.reply(b"w1", 1, stream_end())
    went, ended = driver.core.take_news()
    assert went.text.startswith("Generate goes to w: round_robin")
    assert (went.request_id, ended) == ("chat 7", News("over at w: done", request_id="chat 7"))
    assert PROMPT.decode() not in went.text


def test_a_request_without_a_label_is_called_by_its_id() -> None:
    driver = detailed()
    driver.client(b"c1", length(3))
    driver.reply(b"w1", 1, done(3))
    assert [news.request_id for news in driver.core.take_news()] == [rid(3).hex()] * 2


def test_bad_ends_are_told_too() -> None:
    driver = detailed()
    driver.client(b"c1", length(1))
    driver.reply(b"w1", 1, wire.failed(rid(1), InternalError("a secret")))
    driver.client(b"c1", length(2, deadline_ms=100))
    driver.tick(0.5)
    driver.client(b"c1", length(3, deadline_ms=0))
    driver.client(b"c1", length(4))
    driver.client(b"c1", m.Goodbye(reason=""))
    assert [news.text for news in driver.core.take_news() if "goes to" not in news.text] == [
        "over at w: failed",
        "over at w: DEADLINE",
        "Length is refused: DEADLINE",
        "over at w: its client is gone",
    ]


def test_of_single_requests_nothing_is_told_unless_it_is_asked_for() -> None:
    driver = Driver()
    driver.join_worker(b"w1", "w")
    driver.join_client()
    driver.core.take_news()
    driver.client(b"c1", length(1))
    driver.client(b"c1", length(2, deadline_ms=0))
    driver.reply(b"w1", 1, done(1))
    assert driver.core.take_news() == []


TRACE, PARENT = "a" * 32, "b" * 16
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


def traced(trace: str, *, is_tracing: bool = True) -> tuple[Driver, m.Assign]:
    """A driver with one generation on its way, and its envelope."""
    driver = Driver(is_tracing=is_tracing)
    driver.join_worker(b"w1", "w")
    driver.join_client()
    (heard,) = driver.client(b"c1", generate(driver.open_stream(), trace=trace, label="chat 7"), PROMPT)
    assert isinstance(heard.message, m.Assign)
    return driver, heard.message


def test_a_recorded_generation_has_a_span_that_the_worker_is_asked_within() -> None:
    driver, assign = traced(SAMPLED)
    began_at = driver.now
    assert driver.core.take_spans() == []
    driver.now += 2.0
    driver.reply(b"w1", 1, stream_end())
    (span,) = driver.core.take_spans()
    assert (span.parent, span.started_at, span.error) == (TraceContext(TRACE, PARENT, True), began_at, "")
    assert assign.trace == f"00-{TRACE}-{span.id}-01"
    assert (len(span.id), span.id != PARENT) == (16, True)
    assert span.attributes["kvcache.worker.id"] == "w"
    assert span.attributes["kvcache.request.id"] == "chat 7"
    assert driver.core.take_spans() == []


def test_a_span_says_how_its_generation_failed() -> None:
    driver, _ = traced(SAMPLED)
    driver.tick(61.0)
    (span,) = driver.core.take_spans()
    assert span.error == "WORKER_LOST"


def test_nothing_is_recorded_that_nobody_records_or_takes() -> None:
    for trace, is_tracing in ((UNSAMPLED, True), ("", True), (SAMPLED, False)):
        driver, assign = traced(trace, is_tracing=is_tracing)
        driver.reply(b"w1", 1, stream_end())
        assert (assign.trace, driver.core.take_spans()) == ("", [])
