"""What the broker tells of single requests: nothing, or in detail; and never what they hold."""

from __future__ import annotations

from bus import messages as m
from bus import wire
from bus.errors import InternalError
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
