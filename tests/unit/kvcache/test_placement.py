"""From a request to a worker: owners for sequences, policies for the rest, and the same answer when asked why."""

from __future__ import annotations

from collections import Counter

import pytest

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from kvcache.ring import HashRing
from tests.unit.kvcache.broker_driver import PROMPT, Driver, beat, done, generate, length, rid

NAMES = ("worker-0", "worker-1", "worker-2", "worker-3")


def cluster(**config: object) -> Driver:
    """Four workers, each on a link that is its name, and one client."""
    driver = Driver(**config)
    for name in NAMES:
        driver.join_worker(name.encode(), name)
    driver.join_client()
    return driver


def place(driver: Driver, message: m.Message) -> str:
    """The worker that a request goes to, or the code of its refusal."""
    payload = [PROMPT] if isinstance(message, m.Generate | m.Tokenize | m.Detokenize) else []
    (heard,) = driver.client(b"c1", message, *payload)
    return heard.link.decode() if isinstance(heard.message, m.Assign) else ErrorCode(heard.message.code).name


def nodes(*names: str) -> tuple[bytes, ...]:
    return tuple(name.encode().ljust(8, b".") for name in names)


@pytest.mark.parametrize("policy", ["consistent_hash", "bounded_load", "least_loaded", "round_robin"])
def test_a_sequence_is_served_by_its_owner_under_every_policy(policy: str) -> None:
    driver, ring = cluster(policy=policy), HashRing(dict.fromkeys(NAMES, 100))
    for number in range(40):
        owner = ring.owner(b"s\x00default\x00seq-%d" % number)
        assert place(driver, length(number, f"seq-{number}")) == owner
    for number in range(40, 50):
        chat = generate(driver.open_stream(), number, seq_id="chat")
        assert place(driver, chat) == ring.owner(b"s\x00default\x00chat")


def test_an_owner_that_is_full_is_not_replaced_by_another() -> None:
    """Its sequences are with it and nowhere else."""
    driver = cluster(max_inflight=1)
    owner = place(driver, length(1, "seq"))
    assert place(driver, length(2, "seq")) == "OVERLOADED"
    driver.reply(owner.encode(), 1, done())
    assert place(driver, length(2, "seq")) == owner


def test_tenants_sequences_of_one_name_are_not_one() -> None:
    driver = cluster()
    driver.join_client(b"c2", b"x" * 16, user="bob")
    owners = set()
    for number in range(20):
        mine = place(driver, length(number, f"seq-{number}"))
        (heard,) = driver.client(b"c2", length(number, f"seq-{number}"), user="bob")
        assert heard.message.tenant == "bob"
        owners.add(mine == heard.link.decode())
    assert owners == {True, False}


def test_a_request_can_choose_its_policy_but_not_for_a_sequence() -> None:
    driver = cluster(policy="round_robin")
    chosen = {
        place(driver, generate(driver.open_stream(), n, policy="consistent_hash", chain=nodes("a", "b")))
        for n in range(8)
    }
    assert len(chosen) == 1
    assert place(driver, generate(driver.open_stream(), 20, policy="nonsense")) == "BAD_ARG"
    assert place(driver, generate(driver.open_stream(), 21, policy="least_loaded", seq_id="chat")) == "BAD_ARG"
    assert place(driver, generate(driver.open_stream(), 22, policy="consistent_hash", seq_id="chat")) in NAMES


def test_a_kv_request_must_name_its_sequence() -> None:
    assert place(cluster(), length(1, "")) == "BAD_ARG"


def test_a_list_or_flush_is_of_the_worker_it_names() -> None:
    driver = cluster()
    for number, name in enumerate(NAMES):
        assert place(driver, m.ListSequences(req_id=rid(number), attempt=0, deadline_ms=1000, worker_id=name)) == name
        flush = m.FlushPrefixCache(req_id=rid(20 + number), attempt=0, deadline_ms=1000, worker_id=name)
        assert place(driver, flush) == name
    nobody = m.ListSequences(req_id=rid(9), attempt=0, deadline_ms=1000, worker_id="nobody")
    assert place(driver, nobody) == "BAD_ARG"


def test_a_question_about_tokens_goes_to_whoever_has_least_to_do() -> None:
    driver = cluster()
    payload = wire.describe([PROMPT])
    questions: list[m.Message] = [
        m.Tokenize(req_id=rid(number), attempt=0, deadline_ms=1000, kind=m.PromptKind.TEXT, payload=payload)
        for number in range(len(NAMES) - 1)
    ]
    questions.append(m.Detokenize(req_id=rid(9), attempt=0, deadline_ms=1000, payload=payload))
    assert sorted(place(driver, question) for question in questions) == sorted(NAMES)


def test_round_robin_gives_each_as_many_as_its_weight_says() -> None:
    driver = Driver()
    for name, weight in {"a": 100, "b": 200, "c": 100}.items():
        driver.join_worker(name.encode(), name, weight=weight)
    driver.join_client()
    counts = Counter(place(driver, generate(driver.open_stream(), number)) for number in range(80))
    assert counts == {"a": 20, "b": 40, "c": 20}


def test_a_worker_that_joins_or_comes_back_is_not_made_to_catch_up() -> None:
    driver = cluster()
    driver.worker(b"worker-3", beat(state=m.WorkerState.DRAINING))
    counts = Counter(place(driver, generate(driver.open_stream(), number)) for number in range(300))
    assert counts == {"worker-0": 100, "worker-1": 100, "worker-2": 100}

    driver.worker(b"worker-3", beat(state=m.WorkerState.READY))
    driver.join_worker(b"worker-4", "worker-4")

    counts = Counter(place(driver, generate(driver.open_stream(), number)) for number in range(300, 350))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == 5


def test_load_is_counted_when_a_request_is_dispatched() -> None:
    """Two that arrive together must not both see an idle worker."""
    driver = cluster(policy="least_loaded")
    placed = [place(driver, generate(driver.open_stream(), number)) for number in range(8)]
    assert Counter(placed) == dict.fromkeys(NAMES, 2)
    for call, name in enumerate(placed, start=1):
        if name == "worker-2":
            driver.reply(b"worker-2", call, done())
    assert [place(driver, generate(driver.open_stream(), number)) for number in (8, 9)] == ["worker-2"] * 2


def test_a_silent_worker_gets_nothing_new_but_what_is_its_own() -> None:
    driver = cluster(policy="consistent_hash")
    quiet = place(driver, generate(driver.open_stream(), 1, chain=nodes("a", "b")))
    for _ in range(4):
        driver.tick(0.2)
        driver.client(b"c1", m.Beat(beat=1))
        for name in NAMES:
            if name != quiet:
                driver.worker(name.encode(), beat())
    assert place(driver, generate(driver.open_stream(), 2, chain=nodes("a", "b"))) != quiet
    ring = HashRing(dict.fromkeys(NAMES, 100))
    named = next(f"seq-{n}" for n in range(100) if ring.owner(b"s\x00default\x00seq-%d" % n) == quiet)
    assert place(driver, length(3, named)) == quiet


def test_every_worker_full_is_overloaded() -> None:
    driver = cluster(max_inflight=1, policy="bounded_load")
    assert {place(driver, generate(driver.open_stream(), number)) for number in range(4)} == set(NAMES)
    assert place(driver, generate(driver.open_stream(), 4)) == "OVERLOADED"


def test_an_explanation_lists_the_candidates_as_they_were_weighed() -> None:
    driver = cluster(policy="bounded_load")
    route = m.Route(req_id=rid(1), chain=nodes("a", "b"))
    owner = driver.client(b"c1", route)[0].message.worker_id
    for number in range(2, 30):
        place(
            driver, generate(driver.open_stream(), number, policy="consistent_hash", chain=nodes("a", "b", str(number)))
        )

    placement = driver.core._requests.placement
    place_ = placement.place("default", route, driver.now)
    worker = place_.worker
    explanation = placement.explain("default", route, place_, driver.now)

    assert explanation.policy == "bounded_load"
    assert [candidate.rank for candidate in explanation.candidates] == [0, 1, 2, 3]
    assert sorted(candidate.worker_id for candidate in explanation.candidates) == list(NAMES)
    chosen = next(c for c in explanation.candidates if c.worker_id == explanation.worker_id == worker.id)
    assert chosen.load < chosen.limit
    assert all(c.load >= c.limit for c in explanation.candidates[: chosen.rank])
    assert explanation.candidates[0].worker_id == owner
    assert chosen.rank > 0
    assert {candidate.note for candidate in explanation.candidates} == {""}
