"""What the broker learns of its workers, and what placing and explaining make of it: reports in, decisions out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from bus import messages as m
from bus import wire
from bus.errors import ErrorCode
from bus.stats import Explanation, Holding, Holdings, PeerStats, WorkerStats, WorkerView, pack, unpack
from kvcache.broker.knowledge import SHARE_NODES
from kvcache.hashing import ROUTING_BLOCK_TOKENS, routing_chain
from kvcache.routing.keys import NO_KEY
from kvcache.routing.policies import DEFAULT_POLICY
from kvcache.routing.rates import START_TOKENS
from tests.unit.kvcache.broker_driver import Driver, beat, done, generate, nodes_held, rid, stream_end, worker_hello

TOKENS = list(range(320))
CHAIN = routing_chain(TOKENS)
PAYLOAD = wire.describe([bytes(4 * len(TOKENS))])


def cluster(**config: object) -> Driver:
    driver = Driver(**config)
    for name in ("w1", "w2"):
        driver.join_worker(name.encode(), name)
    driver.join_client()
    return driver


def view(driver: Driver, name: str) -> WorkerView:
    views = driver.core.cluster_stats(driver.now, m.QueryKind.WORKERS).workers
    return next(it for it in views if it.worker_id == name)


def changed(first: int, *nodes: bytes, is_stored: bool = True, tenant: str = "default") -> tuple[m.NodesChanged, bytes]:
    payload = b"".join(nodes)
    runs = (m.NodeRun(tenant, is_stored, len(nodes)),)
    return m.NodesChanged(first=first, runs=runs, payload=wire.describe([payload])), payload


def explain(
    driver: Driver, chain: tuple[bytes, ...] = CHAIN, link: bytes = b"c1", user: str = "default"
) -> Explanation:
    (heard,) = driver.client(link, m.Route(req_id=rid(99), chain=chain), user=user)
    tenant = driver.core._requests.placement.place(user, m.Route(req_id=rid(99), chain=chain), driver.now)
    explanation = driver.core._requests.placement.explain(
        user, m.Route(req_id=rid(99), chain=chain), tenant, driver.now
    )
    assert heard.message.worker_id == explanation.worker_id
    return explanation


def hits(explanation: Explanation) -> dict[str, int]:
    return {it.worker_id: it.hit_tokens for it in explanation.candidates}


def submit(driver: Driver, number: int, **fields: Any) -> int:
    """Dispatch a generation over CHAIN; the number of its call."""
    options = {"kind": m.PromptKind.TOKENS, "chain": CHAIN, "payload": PAYLOAD} | fields
    heard = driver.client(b"c1", generate(driver.open_stream(), number, **options), bytes(4 * len(TOKENS)))
    (assign,) = [it.message for it in heard if isinstance(it.message, m.Assign)]
    return assign.call


def test_what_a_worker_holds_is_known_once_it_has_told_it() -> None:
    driver = cluster()
    driver.worker(b"w3", worker_hello("w3"))
    assert view(driver, "w3").index == "blind"
    driver.worker(b"w3", nodes_held(*CHAIN[:4], after=4), b"".join(CHAIN[:4]))
    assert (view(driver, "w3").index, view(driver, "w3").indexed_nodes) == ("exact", 4)
    assert hits(explain(driver)) == {"w1": 0, "w2": 0, "w3": 128}
    assert driver.worker(b"w3", *changed(5, *CHAIN[4:])) == []
    assert hits(explain(driver))["w3"] == len(TOKENS)
    assert driver.worker(b"w3", *changed(11, CHAIN[2], is_stored=False)) == []
    assert hits(explain(driver))["w3"] == 64
    assert driver.stats().indexed_nodes == 9
    driver.core.check()


def test_a_prompt_that_is_scored_is_found_nowhere_since_it_is_computed_anew() -> None:
    driver = cluster()
    driver.worker(b"w1", nodes_held(*CHAIN, after=10), b"".join(CHAIN))
    for prompt_logprobs, expected in ((None, {"w1": 320}), (0, {})):
        sampling = m.Sampling(prompt_logprobs=prompt_logprobs)
        message = generate(rid(7), 1, kind=m.PromptKind.TOKENS, chain=CHAIN, payload=PAYLOAD, sampling=sampling)
        prompt = driver.core._requests.placement.place("default", message, driver.now).prompt
        assert prompt is not None
        assert (prompt.num_tokens, prompt.hits) == (320, expected)


def test_another_tenant_cannot_learn_who_holds_a_prompt() -> None:
    driver = cluster()
    driver.worker(b"w1", nodes_held(*CHAIN, after=10), b"".join(CHAIN))
    driver.join_client(b"c2", b"x" * 16, user="bob")
    assert hits(explain(driver, link=b"c2", user="bob")) == {"w1": 0, "w2": 0}
    assert hits(explain(driver)) == {"w1": 320, "w2": 0}


def test_a_gap_in_its_reports_has_the_worker_asked_at_once_and_again_after_a_second() -> None:
    driver = cluster()
    driver.worker(b"w1", *changed(1, CHAIN[0]))
    (asked,) = driver.worker(b"w1", *changed(3, CHAIN[2]))
    assert (asked.link, asked.message) == (b"w1", m.AskNodes(after=1))
    assert (view(driver, "w1").index, view(driver, "w1").index_gaps) == ("degraded", 1)
    assert driver.worker(b"w1", *changed(4, CHAIN[3])) == []
    assert driver.tick(0.5) == []
    for link in (b"w1", b"w2"):
        driver.worker(link, beat())
    asks = [heard.message for heard in driver.tick(0.75) if isinstance(heard.message, m.AskNodes)]
    assert asks == [m.AskNodes(after=1)]
    driver.worker(b"w1", *changed(2, *CHAIN[1:4]))
    assert (view(driver, "w1").index, hits(explain(driver))["w1"]) == ("exact", 128)


def test_a_beat_shows_that_the_last_report_was_lost() -> None:
    driver = cluster()
    driver.worker(b"w1", *changed(1, CHAIN[0]))
    heard = driver.worker(b"w1", beat(changes=2))
    assert [it.message for it in heard if isinstance(it.message, m.AskNodes)] == [m.AskNodes(after=1)]


def test_a_worker_that_goes_takes_its_nodes_along_and_comes_back_with_none() -> None:
    driver = cluster()
    driver.worker(b"w1", nodes_held(*CHAIN, after=10), b"".join(CHAIN))
    driver.worker(b"w1", m.Goodbye(reason=""))
    assert hits(explain(driver)) == {"w2": 0}
    driver.worker(b"new link", worker_hello("w1", incarnation=2))
    assert view(driver, "w1").index == "blind"
    assert hits(explain(driver)) == {"w1": 0, "w2": 0}
    driver.tick()
    assert driver.stats().indexed_nodes == 0
    driver.core.check()


@pytest.mark.parametrize(
    "report",
    [
        (m.NodesChanged(first=2, runs=(m.NodeRun("default", True, 3),), payload=wire.describe([CHAIN[0]])), CHAIN[0]),
        (m.NodesHeld(after=0, part=0, is_last=True, runs=(), payload=wire.describe([b"odd"])), b"odd"),
        (m.NodesChanged(first=2, runs=(), payload=wire.describe([CHAIN[0]])), b"not what its checksum says"),
    ],
)
def test_a_report_that_cannot_be_read_harms_only_the_worker_that_sent_it(report: tuple[m.Message, bytes]) -> None:
    driver = cluster()
    for link in (b"w1", b"w2"):
        driver.worker(link, *changed(1, *CHAIN))
    assert driver.worker(b"w1", *report) == []
    assert driver.stats().malformed == 1
    assert hits(explain(driver)) == {"w1": 320, "w2": 320}
    said = [heard.message for _ in range(99) for heard in driver.worker(b"w1", *report)]
    assert [type(message) for message in said] == [m.Goodbye]
    assert hits(explain(driver)) == {"w2": 320}
    assert view(driver, "w2").index == "exact"


def test_reports_of_a_stranger_are_dropped() -> None:
    driver = cluster()
    assert driver.worker(b"stranger", *changed(1, *CHAIN)) == []
    assert driver.worker(b"stranger", m.Prefilled(call=1, num_tokens=1, num_cached=0, compute_ms=1.0)) == []
    assert hits(explain(driver)) == {"w1": 0, "w2": 0}


def test_work_is_counted_from_dispatch_to_the_first_token() -> None:
    driver = cluster(policy="consistent_hash")
    first = submit(driver, 1)
    worker = next(name for name in ("w1", "w2") if view(driver, name).queue_s > 0)
    link = worker.encode()
    waiting = view(driver, worker).queue_s
    submit(driver, 2)
    assert view(driver, worker).queue_s > waiting
    report = m.Prefilled(call=first, num_tokens=320, num_cached=0, compute_ms=64.0)
    driver.worker(link, report)
    assert view(driver, worker).queue_s < 2 * waiting
    assert view(driver, worker).prefill_tokens_per_s == pytest.approx((320 + START_TOKENS) / 0.064, rel=0.01)
    driver.worker(link, report)  # said twice it counts once
    assert driver.stats().prompt_tokens == 320
    driver.core.check()
    driver.reply(link, first, stream_end(1))
    driver.client(b"c1", m.Goodbye(reason=""))
    assert view(driver, worker).queue_s == 0
    driver.core.check()


def test_a_worker_cannot_report_on_calls_of_another() -> None:
    driver = cluster(policy="consistent_hash")
    call = submit(driver, 1)
    worker, other = ("w1", "w2") if view(driver, "w1").queue_s > 0 else ("w2", "w1")
    driver.worker(other.encode(), m.Prefilled(call=call, num_tokens=320, num_cached=0, compute_ms=1.0))
    assert view(driver, worker).queue_s > 0
    assert driver.stats().prompt_tokens == 0


def test_a_prompt_that_is_being_computed_counts_as_held_until_its_first_token() -> None:
    """Who comes second finds it on its way, and need not have it computed elsewhere."""
    driver = cluster(policy="consistent_hash")
    call = submit(driver, 1)
    worker = next(name for name in ("w1", "w2") if view(driver, name).queue_s > 0)
    assert hits(explain(driver))[worker] == 320
    driver.worker(worker.encode(), m.Prefilled(call=call, num_tokens=320, num_cached=0, compute_ms=1.0))
    assert hits(explain(driver))[worker] == 0
    submit(driver, 2)
    assert hits(explain(driver))[worker] == 320
    driver.client(b"c1", m.Goodbye(reason=""))
    driver.join_client()
    assert hits(explain(driver))[worker] == 0
    driver.core.check()


def test_an_explanation_shows_what_each_candidate_was_thought_to_hold_and_to_have_before_it() -> None:
    driver = cluster(policy="least_loaded")
    driver.worker(b"w2", *changed(1, *CHAIN[:5]))
    submit(driver, 1, chain=())
    explanation = explain(driver)
    assert explanation.num_tokens == 320
    by_name = {it.worker_id: it for it in explanation.candidates}
    assert (by_name["w1"].index, by_name["w2"].index) == ("exact", "exact")
    assert (by_name["w1"].hit_tokens, by_name["w2"].hit_tokens) == (0, 160)
    assert sorted(it.queue_s > 0 for it in explanation.candidates) == [False, True]


def test_what_was_foreseen_and_what_was_cached_is_counted() -> None:
    driver = cluster(policy="consistent_hash")
    for link in (b"w1", b"w2"):
        driver.worker(link, *changed(1, *CHAIN[:5]))
    call = submit(driver, 1)
    for link in (b"w1", b"w2"):
        driver.worker(link, m.Prefilled(call=call, num_tokens=320, num_cached=128, compute_ms=9.0))
    stats = driver.stats()
    assert (stats.prompt_tokens, stats.foreseen_tokens, stats.cached_tokens) == (320, 160, 128)


def test_the_length_of_a_text_is_estimated_from_what_texts_came_to() -> None:
    driver = cluster(policy="consistent_hash")
    text = "x" * 6400
    fields = {"kind": m.PromptKind.TEXT, "chain": routing_chain(text), "payload": wire.describe([text.encode()])}
    placement = driver.core._requests.placement
    guess = generate(driver.open_stream(), 1, **fields)
    before = placement.place("default", guess, driver.now).prompt
    assert before is not None
    assert before.num_tokens == 1600
    link = b""
    for number in range(2, 150):
        heard = driver.client(b"c1", generate(driver.open_stream(), number, **fields), text.encode())
        call, link = heard[0].message.call, heard[0].link
        driver.worker(link, m.Prefilled(call=call, num_tokens=3200, num_cached=0, compute_ms=1.0))
        driver.reply(link, call, stream_end(number))
    after = placement.place("default", guess, driver.now).prompt
    assert after is not None
    assert after.num_tokens == pytest.approx(3200, rel=0.05)
    link_nodes = routing_chain(text)
    driver.worker(link, *changed(1, *link_nodes[:25]))
    half = placement.place("default", guess, driver.now).prompt
    assert half is not None
    assert half.hits[link.decode()] == pytest.approx(1600, rel=0.05)


def test_a_refused_request_leaves_no_work_behind() -> None:
    driver = cluster(max_inflight=1, policy="bounded_load")
    submit(driver, 1)
    submit(driver, 2)
    payload = bytes(4 * len(TOKENS))
    third = generate(driver.open_stream(), 3, kind=m.PromptKind.TOKENS, chain=CHAIN, payload=PAYLOAD)
    (refused,) = driver.client(b"c1", third, payload)
    assert refused.message.code == ErrorCode.OVERLOADED
    for call, link in ((1, b"w1"), (1, b"w2"), (2, b"w1"), (2, b"w2")):
        driver.reply(link, call, done(call))
    assert (view(driver, "w1").queue_s, view(driver, "w2").queue_s) == (0, 0)
    driver.core.check()


def test_an_explanation_comes_with_a_generation_that_asks_for_it() -> None:
    driver = cluster()
    message = generate(driver.open_stream(), 1, kind=m.PromptKind.TOKENS, chain=CHAIN, payload=PAYLOAD, explain=True)
    frames = driver.core.on_client(b"c1", [wire.encode(message), bytes(4 * len(TOKENS))], driver.now, "default")
    explanation = unpack(bytes(frames[0].frames[1]), Explanation)
    assert explanation.num_tokens == 320
    assert len(explanation.candidates) == 2


def place(driver: Driver, number: int, **fields: Any) -> m.Message | bytes:
    """The link of the worker that a generation over CHAIN goes to, or its refusal."""
    options = {"kind": m.PromptKind.TOKENS, "chain": CHAIN, "payload": PAYLOAD} | fields
    (heard,) = driver.client(b"c1", generate(driver.open_stream(), number, **options), bytes(4 * len(TOKENS)))
    return heard.link if isinstance(heard.message, m.Assign) else heard.message


@pytest.mark.parametrize("holder", [b"w1", b"w2"])
def test_by_default_a_prompt_goes_to_the_worker_that_holds_its_beginning(holder: bytes) -> None:
    driver = cluster(policy=DEFAULT_POLICY)
    driver.worker(holder, *changed(1, *CHAIN))
    assert place(driver, 1) == holder


def test_a_cold_prompt_that_is_being_computed_is_not_computed_again_elsewhere() -> None:
    driver = cluster(policy=DEFAULT_POLICY)
    for number in range(200, 208):
        learned = submit(driver, number, chain=())
        for link in (b"w1", b"w2"):
            driver.worker(link, m.Prefilled(call=learned, num_tokens=320, num_cached=0, compute_ms=3200.0))
            driver.reply(link, learned, stream_end(number))
    assert len({place(driver, number) for number in range(4)}) == 1


def test_what_no_worker_can_begin_in_time_is_refused_with_when_to_ask_again() -> None:
    driver = cluster(policy=DEFAULT_POLICY)
    assert isinstance(place(driver, 1, deadline_ms=1), bytes)  # nothing is known of their rates yet
    place(driver, 2, policy="least_loaded")
    for call, link in ((1, b"w1"), (1, b"w2"), (2, b"w1"), (2, b"w2")):
        driver.worker(link, m.Prefilled(call=call, num_tokens=320, num_cached=0, compute_ms=3200.0))
        driver.reply(link, call, stream_end(call))
    refused = place(driver, 4, deadline_ms=1000)
    assert isinstance(refused, m.Failed)
    assert refused.code == ErrorCode.OVERLOADED
    assert 2000 < refused.retry_after_ms < 2400
    assert isinstance(place(driver, 3, deadline_ms=10_000), bytes)
    driver.core.check()


def test_what_waits_at_a_worker_for_other_brokers_is_heard_of_in_its_beats() -> None:
    driver = cluster(policy="consistent_hash")
    driver.worker(b"w1", beat(backlog_tokens=1000))
    assert view(driver, "w1").queue_s == 0  # how long that takes is not known yet
    for number in range(2):
        call = submit(driver, number + 1, policy="round_robin")
        for link in (b"w1", b"w2"):
            driver.worker(link, m.Prefilled(call=call, num_tokens=320, num_cached=0, compute_ms=640.0))
    driver.worker(b"w1", beat(backlog_tokens=1000))
    assert view(driver, "w1").queue_s == pytest.approx(1000 * 0.64 / (320 + START_TOKENS), rel=0.01)
    assert view(driver, "w2").queue_s == 0
    driver.worker(b"w1", beat(backlog_tokens=0))
    assert view(driver, "w1").queue_s == 0


def test_decisions_are_counted_by_policy_and_reason() -> None:
    driver = cluster(policy=DEFAULT_POLICY)
    driver.worker(b"w1", *changed(1, *CHAIN))
    place(driver, 1)
    place(driver, 2, policy="least_loaded")
    place(driver, 3, policy="consistent_hash")
    stats = driver.stats()
    assert stats.routed == {"prefix": 1, "least_loaded": 1, "consistent_hash": 1}
    assert stats.reasons == {"prefix: has": 1, "least_loaded": 1, "consistent_hash: owner": 1}


PEER = "tcp://127.0.0.1:4000"


def linked() -> tuple[Driver, str, str]:
    """A cluster that has timed a prefill, the worker that holds CHAIN since then, and the other one."""
    driver = Driver(policy="prefix")
    for name in ("w1", "w2"):
        driver.join_worker(name.encode(), name, peer_url=PEER)
    driver.join_client()
    call = submit(driver, 1)
    holder, other = ("w1", "w2") if view(driver, "w1").inflight else ("w2", "w1")
    driver.worker(holder.encode(), m.Prefilled(call=call, num_tokens=320, num_cached=0, compute_ms=320.0))
    driver.reply(holder.encode(), call, stream_end(1))
    driver.worker(holder.encode(), *changed(1, *CHAIN))
    driver.core.tick(driver.now)
    return driver, holder, other


def keep_busy(driver: Driver, holder: str, number: int) -> None:
    """Have this worker compute something that takes a while, by naming its sequence."""
    tokens, names = 4096, (f"busy-{index}" for index in itertools.count())
    name = next(name for name in names if owner_of(driver, name) == holder)
    payload = wire.describe([bytes(4 * tokens)])
    message = generate(driver.open_stream(), number, kind=m.PromptKind.TOKENS, seq_id=name, payload=payload)
    driver.client(b"c1", message, bytes(4 * tokens))


def owner_of(driver: Driver, seq_id: str) -> str:
    (heard,) = driver.client(b"c1", m.Route(req_id=rid(98), seq_id=seq_id))
    return str(heard.message.worker_id)


def order_of(driver: Driver, number: int, **fields: Any) -> tuple[m.PullOrder | None, m.Assign]:
    options = {"kind": m.PromptKind.TOKENS, "chain": CHAIN, "payload": PAYLOAD} | fields
    heard = driver.client(b"c1", generate(driver.open_stream(), number, **options), bytes(4 * len(TOKENS)))
    (assign,) = [it.message for it in heard if isinstance(it.message, m.Assign)]
    return assign.pull, assign


def owned_by(driver: Driver, worker: str) -> str:
    """The name of a sequence that nobody has yet and this worker owns."""
    return next(name for name in (f"chat-{index}" for index in itertools.count()) if owner_of(driver, name) == worker)


def test_the_owner_of_a_sequence_that_begins_pulls_what_others_have_of_its_prompt() -> None:
    driver, holder, other = linked()
    order, assign = order_of(driver, 10, seq_id=owned_by(driver, other))
    assert order is not None
    assert (order.worker_id, order.num_tokens) == (holder, len(TOKENS))
    assert assign.reason.startswith("consistent_hash: owner of")
    assert driver.core.cluster_stats(driver.now, m.QueryKind.STATS).broker.pulls_ordered == 1


def test_an_owner_that_has_the_prompt_itself_pulls_nothing() -> None:
    driver, holder, _ = linked()
    assert order_of(driver, 10, seq_id=owned_by(driver, holder))[0] is None


def test_a_sequence_that_somebody_has_goes_on_from_that_and_pulls_nothing() -> None:
    driver, _, other = linked()
    name = owned_by(driver, other)
    page = pack(Holdings(sequences=(Holding("default", name, 7),)))
    driver.worker(other.encode(), m.WorkerSequences(is_complete=True, payload=wire.describe([page])), page)
    assert order_of(driver, 10, seq_id=name)[0] is None


def test_a_sequence_placed_by_the_hash_alone_pulls_nothing() -> None:
    driver, _, other = linked()
    assert order_of(driver, 10, seq_id=owned_by(driver, other), policy="consistent_hash")[0] is None


def status(peers: PeerStats) -> tuple[m.WorkerStatus, bytes]:
    payload = pack(WorkerStats(worker_id="w", incarnation=1, state="ready", peers=peers))
    return m.WorkerStatus(payload=wire.describe([payload])), payload


def test_a_busy_holder_is_copied_from_by_the_other_with_a_budget_of_what_that_saves() -> None:
    driver, holder, other = linked()
    keep_busy(driver, holder, 2)
    order, assign = order_of(driver, 3)
    assert order is not None
    assert (order.worker_id, order.num_tokens) == (holder, 320)
    assert order.budget_ms == pytest.approx(320, abs=2)
    driver.worker(other.encode(), m.Prefilled(call=assign.call, num_tokens=320, num_cached=319, compute_ms=1.0))
    assert driver.stats().foreseen_tokens == 319
    driver.core.check()


def test_only_one_pull_is_tried_over_a_link_of_which_nothing_is_known() -> None:
    driver, holder, other = linked()
    keep_busy(driver, holder, 2)
    (first, _), (second, _) = order_of(driver, 3), order_of(driver, 4)
    assert first is not None
    assert second is None
    driver.worker(other.encode(), *status(PeerStats(pulls=1, whole_tokens=320, pulled_s=0.032)))
    assert view(driver, other).pull_tokens_per_s == pytest.approx(10_000.0)


@pytest.mark.parametrize(
    ("peers", "pulls_again"),
    [
        (PeerStats(pulls=1, whole_tokens=320, pulled_s=0.01), True),
        (PeerStats(pulls=1, whole_tokens=320, pulled_s=0.3), False),
        (PeerStats(failures={"CONNECTION_LOST": 1}), False),
        (PeerStats(failures={"NOT_FOUND": 1}), True),
        (PeerStats(pulls=-1, whole_tokens=-5, pulled_s=-1.0), True),
        (PeerStats(pulls=1, whole_tokens=320, pulled_s=float("nan")), True),
    ],
)
def test_how_pulls_went_decides_whether_there_are_more(peers: PeerStats, pulls_again: bool) -> None:
    driver, holder, other = linked()
    keep_busy(driver, holder, 2)
    first, assign = order_of(driver, 3)
    assert first is not None
    driver.worker(other.encode(), *status(peers))
    driver.reply(other.encode(), assign.call, stream_end(3))
    assert (order_of(driver, 4)[0] is not None) == pulls_again


def test_nobody_copies_from_a_worker_that_cannot_be_reached() -> None:
    driver = cluster(policy="prefix")
    call = submit(driver, 1)
    holder = "w1" if view(driver, "w1").inflight else "w2"
    driver.worker(holder.encode(), m.Prefilled(call=call, num_tokens=320, num_cached=0, compute_ms=320.0))
    driver.worker(holder.encode(), *changed(1, *CHAIN))
    driver.core.tick(driver.now)
    keep_busy(driver, holder, 2)
    order, assign = order_of(driver, 3)
    assert order is None
    assert "pulls" not in assign.reason
    assert driver.stats().foreseen_tokens == 0


def test_a_beginning_that_a_tenant_often_asks_for_is_due_on_more_workers_than_have_it() -> None:
    driver = cluster()
    for number in range(6):
        submit(driver, number)
    knowledge = driver.core._requests.placement._knowledge

    def due_tokens(tenant: str, *holders: str) -> int:
        prompt = knowledge.read(tenant, m.Route(req_id=rid(99), chain=CHAIN))
        prompt = prompt._replace(hits=dict.fromkeys(holders, len(TOKENS)))
        return knowledge.request(tenant, NO_KEY, prompt, 60.0, driver.now).due_tokens

    assert due_tokens("default", "w1") == SHARE_NODES * ROUTING_BLOCK_TOKENS
    assert due_tokens("default", "w1", "w2") == 0
    assert due_tokens("bob", "w1") == 0
