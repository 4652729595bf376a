"""Orders to copy from one worker to another: who is told what, and that nobody else is told anything."""

from __future__ import annotations

from typing import Any

import pytest

from bus import messages as m
from kvcache.broker.pulls import MAX_PULL_TOKENS, MAX_TICKET_MS
from kvcache.broker.sends import Port
from tests.unit.kvcache.broker_driver import PROMPT, USER, Driver, Heard, generate, worker_hello

URL = "tcp://127.0.0.1:4000"


@pytest.fixture
def driver() -> Driver:
    driver = Driver()
    driver.join_worker(b"w1", "one", peer_url=URL)
    driver.join_worker(b"w2", "two", peer_url="tcp://127.0.0.1:4001")
    driver.join_client()
    return driver


def submit(driver: Driver, number: int = 1, **fields: Any) -> list[Heard]:
    return driver.client(b"c1", generate(driver.open_stream(), number, **fields), PROMPT)


def assigned(heard: list[Heard]) -> m.Assign:
    (found,) = [one.message for one in heard if isinstance(one.message, m.Assign)]
    return found


def other_than(heard: list[Heard]) -> str:
    """The worker that was not chosen."""
    (link,) = [one.link for one in heard if isinstance(one.message, m.Assign)]
    return "two" if link == b"w1" else "one"


def test_holder_hears_of_the_ticket_before_the_target_gets_its_order(driver: Driver) -> None:
    first = submit(driver)
    assert assigned(first).pull is None
    source = "one" if other_than(first) == "two" else "two"  # it is the other's turn now
    grant, assign = submit(driver, 2, pull_from=source, deadline_ms=5000)
    order = assign.message.pull
    assert (grant.port, grant.link) == (Port.WORKER, b"w1" if source == "one" else b"w2")
    assert assign.link != grant.link
    assert grant.message == m.Grant(
        ticket=order.ticket,
        target="two" if source == "one" else "one",
        tenant=USER,
        num_tokens=MAX_PULL_TOKENS,
        ttl_ms=5000,
    )
    url = URL if source == "one" else "tcp://127.0.0.1:4001"
    assert (order.worker_id, order.url, order.num_tokens, order.budget_ms) == (source, url, MAX_PULL_TOKENS, 5000)


def test_each_ticket_is_new(driver: Driver) -> None:
    orders = [assigned(submit(driver, number, pull_from="one")).pull for number in range(8)]
    assert len({order.ticket for order in orders if order is not None}) == 4


def test_ticket_of_a_patient_request_does_not_live_as_long(driver: Driver) -> None:
    heard = submit(driver, pull_from="one", deadline_ms=7 * MAX_TICKET_MS)
    if assigned(heard).pull is None:
        heard = submit(driver, 2, pull_from="one", deadline_ms=7 * MAX_TICKET_MS)
    (grant,) = [one.message for one in heard if isinstance(one.message, m.Grant)]
    assert grant.ttl_ms == MAX_TICKET_MS


@pytest.mark.parametrize("source", ["nobody", "mute", ""])
def test_worker_that_is_gone_or_cannot_be_reached_is_not_copied_from(driver: Driver, source: str) -> None:
    driver.join_worker(b"w3", "mute")
    for number in range(3):
        (heard,) = submit(driver, number, pull_from=source)
        assert heard.message.pull is None


def test_worker_is_not_told_to_copy_from_itself(driver: Driver) -> None:
    for number in range(4):
        heard = submit(driver, number, pull_from="one")
        on_one = any(one.link == b"w1" and isinstance(one.message, m.Assign) for one in heard)
        assert (assigned(heard).pull is None) == on_one


def test_worker_of_another_user_is_not_copied_from(driver: Driver) -> None:
    driver.worker(b"w4", m.WorkerHello(worker_id="theirs", incarnation=1, major=2, minor=0, peer_url=URL), user="other")
    for number in range(3):
        heard = submit(driver, number, pull_from="theirs")
        if all(one.link != b"w4" for one in heard if isinstance(one.message, m.Assign)):
            assert assigned(heard).pull is None


def test_orders_are_counted(driver: Driver) -> None:
    for number in range(4):
        submit(driver, number, pull_from="one")
    assert driver.core.cluster_stats(driver.now, m.QueryKind.STATS).broker.pulls_ordered == 2


def attach(driver: Driver, link: bytes, worker_id: str, **fields: Any) -> None:
    user = fields.pop("user", USER)
    (heard,) = driver.worker(link, worker_hello(worker_id, **fields), user=user)
    driver.worker_bulk(b"bulk-" + link, m.AttachBulk(session=heard.message.session), user=user)


def test_what_one_worker_says_to_another_is_handed_on_as_it_is(driver: Driver) -> None:
    attach(driver, b"w1", "one", peer_url=URL)
    attach(driver, b"w2", "two", peer_url=URL)
    (heard,) = driver.worker_bulk(b"bulk-w1", m.Relay(worker_id="two", is_answer=True), b"not read", b"here")
    assert (heard.port, heard.link, heard.inner) == (Port.WORKER_BULK, b"bulk-w2", (b"not read", b"here"))
    assert heard.message == m.Relay(worker_id="one", is_answer=True), "the broker says who it is"
    assert driver.stats().peer_messages_relayed == 1


@pytest.mark.parametrize("to", ["nobody", "one", "without bulk", "another user's"])
def test_what_cannot_be_handed_on_is_dropped(driver: Driver, to: str) -> None:
    attach(driver, b"w1", "one", peer_url=URL)
    driver.join_worker(b"w3", "without bulk")
    attach(driver, b"w4", "another user's", user="somebody")
    assert driver.worker_bulk(b"bulk-w1", m.Relay(worker_id=to, is_answer=False), b"x") == []
    assert driver.worker_bulk(b"stranger", m.Relay(worker_id="one", is_answer=False), b"x") == []
    assert driver.stats().peer_messages_relayed == 0
