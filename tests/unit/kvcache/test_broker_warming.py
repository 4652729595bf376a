"""Prompts that are wanted most, when the ring changes: who fetches which of them, from whom, and when nobody does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from bus import messages as m
from bus import wire
from bus.errors import WorkerLost
from bus.limits import MAX_PRIORITY
from kvcache.broker.knowledge import Knowledge
from kvcache.broker.members import Workers
from kvcache.broker.warming import DEADLINE_MS, MAX_BYTES, MAX_PROMPT_BYTES, STAY_S, WARM_S, Demand
from kvcache.hashing import routing_chain
from kvcache.ring import HashRing
from kvcache.routing.keys import RoutingKey
from tests.unit.kvcache.broker_driver import USER, Driver, Heard, beat, generate, nodes_held, read, stream_end

READY = (("model", m.ModelState.READY),)


class Cluster:
    """A broker, and workers that beat; `busy`: those where requests wait. dismissed: those that were told to go."""

    def __init__(self, *names: str) -> None:
        self.driver = Driver(policy="prefix")
        self.driver.join_client()
        self.names = list(names)
        self.busy: set[str] = set()
        self.dismissed: set[str] = set()
        self.states: dict[str, m.WorkerState] = {}
        self.models = READY
        self._numbers = iter(range(1, 10_000))
        for name in names:
            self.driver.join_worker(name.encode(), name, peer_url=f"tcp://{name}")
        self.run(3.0)

    def run(self, seconds: float) -> list[Heard]:
        """Let time pass; what workers are told to do meanwhile."""
        heard: list[Heard] = []
        for _ in range(round(seconds / 0.25)):
            for name in self.names:
                state = self.states.get(name, m.WorkerState.READY)
                fields: dict[str, Any] = {"waiting": int(name in self.busy), "models": self.models}
                self.driver.worker(name.encode(), beat(state=state, **fields))
            self.driver.client(b"c1", m.Beat(beat=1))
            heard += self.driver.tick(0.25)
            self.dismissed |= {it.link.decode() for it in heard if isinstance(it.message, m.HandedOver)}
        return [it for it in heard if isinstance(it.message, m.Assign | m.Grant)]

    def join(self, name: str, incarnation: int = 1) -> None:
        self.names.append(name)
        self.driver.join_worker(name.encode(), name, incarnation, peer_url=f"tcp://{name}")

    def ask(self, prompt: str, times: int = 2, **fields: Any) -> str:
        """Have it generated so often; the last worker that did, which holds nothing of it yet."""
        worker = ""
        for _ in range(times):
            number, data = next(self._numbers), prompt.encode()
            chain, payload = routing_chain(prompt), wire.describe([data])
            message = generate(self.driver.open_stream(), number, chain=chain, payload=payload, **fields)
            heard = self.driver.client(b"c1", message, data)
            (assign,) = [it for it in heard if isinstance(it.message, m.Assign)]
            self.driver.reply(assign.link, assign.message.call, stream_end(number))
            worker = assign.link.decode()
        return worker

    def hold(self, name: str, *prompts: str) -> None:
        """A worker tells that it holds these prompts, and nothing else."""
        nodes = [node for prompt in prompts for node in routing_chain(prompt)]
        self.driver.worker(name.encode(), nodes_held(*nodes), b"".join(nodes))


def prompts(count: int) -> list[str]:
    return [f"{number:03} " + "what everybody asks for " * 40 for number in range(count)]


def warmed(heard: Sequence[Heard]) -> list[tuple[str, str, str]]:
    """Which worker was told to fetch which prompt, and from whom."""
    found = []
    for it in heard:
        if isinstance(it.message, m.Assign):
            assert it.message.pull is not None
            found.append((it.link.decode(), it.inner[1].decode(), it.message.pull.worker_id))
    return found


def owner(prompt: str, names: Sequence[str]) -> str:
    """By the second node, at which a prompt is keyed that is not hotter than others."""
    node = routing_chain(prompt)[1]
    return HashRing(dict.fromkeys(names, 100)).owner(b"p\x00" + USER.encode() + b"\x00" + node)


@pytest.fixture
def cluster() -> Cluster:
    """One worker, which was asked for 12 prompts twice each and holds them."""
    cluster = Cluster("one")
    for prompt in prompts(12):
        cluster.ask(prompt)
    cluster.hold("one", *prompts(12))
    assert cluster.run(3.0) == []
    return cluster


def end_all(cluster: Cluster, seconds: float) -> list[tuple[str, str, str]]:
    """Let time pass while workers do at once what they are told to."""
    found = []
    for _ in range(round(seconds / 0.25)):
        for it in (heard := cluster.run(0.25)):
            if isinstance(it.message, m.Assign):
                message = wire.decode(list(it.inner)).message
                assert cluster.driver.reply(it.link, it.message.call, stream_end(0)) == [], "nobody waits for it"
                assert (message.priority, message.deadline_ms) == (MAX_PRIORITY, DEADLINE_MS)
                assert message.sampling.max_tokens == 1
        found += warmed(heard)
    cluster.driver.core.check()
    return found


def test_a_worker_that_joins_fetches_what_it_owns_the_most_wanted_first(cluster: Cluster) -> None:
    for prompt, times in ((prompts(12)[7], 9), (prompts(12)[4], 6)):
        cluster.ask(prompt, times)
    cluster.join("two")
    assert cluster.run(0.75) == [], "not before the ring has settled"
    fetched = end_all(cluster, 10.0)
    mine = {prompt for prompt in prompts(12) if owner(prompt, ["one", "two"]) == "two"}
    assert {prompt for _, prompt, _ in fetched} == mine
    assert {(target, source) for target, _, source in fetched} == {("two", "one")}
    assert len(mine) > 2
    by_demand = [prompt for prompt in (prompts(12)[7], prompts(12)[4]) if prompt in mine]
    assert [prompt for _, prompt, _ in fetched][: len(by_demand)] == by_demand
    stats = cluster.driver.stats()
    assert (stats.warmed_prompts, stats.prompts_to_warm, stats.prompt_tokens) == (len(mine), 0, 0)


def test_one_at_a_time_and_the_holder_has_a_ticket_for_each(cluster: Cluster) -> None:
    cluster.join("two")
    heard = cluster.run(3.0)
    assert [type(it.message) for it in heard] == [m.Grant, m.Assign]
    assert heard[0].link == b"one"
    assert heard[0].message.ticket == heard[1].message.pull.ticket


def test_nothing_is_fetched_while_requests_wait_at_the_newcomer(cluster: Cluster) -> None:
    cluster.busy = {"two"}
    cluster.join("two")
    assert cluster.run(5.0) == []
    cluster.busy = set()
    assert warmed(cluster.run(1.0)) != []


def test_nothing_is_fetched_from_where_requests_wait(cluster: Cluster) -> None:
    cluster.busy = {"one"}
    cluster.join("two")
    assert cluster.run(5.0) == []
    cluster.busy = set()
    assert warmed(cluster.run(1.0)) != []


def test_what_was_not_fetched_in_time_never_is(cluster: Cluster) -> None:
    cluster.busy = {"two"}
    cluster.join("two")
    assert cluster.run(WARM_S + 2.0) == []
    cluster.busy = set()
    assert cluster.run(2.0) == []
    assert cluster.driver.stats().prompts_to_warm == 0


def test_a_worker_is_not_made_to_load_a_model_for_it(cluster: Cluster) -> None:
    cluster.models = (("model", m.ModelState.ABSENT),)
    cluster.join("two")
    assert cluster.run(5.0) == []


def test_what_nobody_holds_is_not_computed(cluster: Cluster) -> None:
    cluster.hold("one")
    cluster.join("two")
    assert cluster.run(5.0) == []


def test_what_it_holds_already_is_not_fetched(cluster: Cluster) -> None:
    cluster.join("two")
    cluster.hold("two", *prompts(12))
    assert cluster.run(5.0) == []


def test_a_prompt_that_was_asked_for_once_or_long_ago_is_not_fetched() -> None:
    cluster = Cluster("one")
    for prompt in prompts(12)[:6]:
        cluster.ask(prompt, 1)
    for prompt in prompts(12)[6:]:
        cluster.ask(prompt, 2)
    cluster.run(60.0)
    cluster.hold("one", *prompts(12))
    cluster.join("two")
    assert cluster.run(5.0) == []


def test_a_worker_that_comes_back_empty_fetches_anew(cluster: Cluster) -> None:
    cluster.join("two")
    before = end_all(cluster, 10.0)
    cluster.names.remove("two")
    cluster.join("two", incarnation=2)
    assert end_all(cluster, 10.0) == before


@pytest.fixture
def unshared(cluster: Cluster) -> Cluster:
    """Two workers, of which one holds all, and the other had no time to fetch any."""
    cluster.busy = {"two"}
    cluster.join("two")
    cluster.run(WARM_S + 2.0)
    for prompt in prompts(12):
        cluster.ask(prompt)
    cluster.busy = set()
    return cluster


def test_what_only_a_worker_holds_that_drains_goes_to_its_new_owner_at_once(unshared: Cluster) -> None:
    unshared.states = {"one": m.WorkerState.DRAINING}
    fetched = end_all(unshared, 5.0)
    assert {prompt for _, prompt, _ in fetched} == set(prompts(12))
    assert {(target, source) for target, _, source in fetched} == {("two", "one")}


def test_a_worker_that_drains_is_kept_until_what_it_alone_holds_was_fetched(unshared: Cluster) -> None:
    unshared.states = {"one": m.WorkerState.DRAINING}
    while unshared.driver.stats().warmed_prompts < 11:
        end_all(unshared, 0.25)
        assert unshared.dismissed == set()
    end_all(unshared, 0.5)
    assert unshared.driver.stats().warmed_prompts == 12
    assert unshared.dismissed == {"one"}


@pytest.mark.parametrize("busy", [{"two"}, set()], ids=["nothing can begin", "the first takes long"])
def test_a_worker_that_drains_is_not_kept_for_long(unshared: Cluster, busy: set[str]) -> None:
    unshared.states, unshared.busy = {"one": m.WorkerState.DRAINING}, busy
    assert bool(unshared.run(STAY_S)) == (not busy)
    assert unshared.dismissed == set()
    unshared.run(0.5)
    assert unshared.dismissed == {"one"}


def test_a_worker_that_drains_need_not_stay_for_what_others_hold_too(unshared: Cluster) -> None:
    unshared.hold("two", *prompts(12))
    unshared.states = {"one": m.WorkerState.DRAINING}
    assert unshared.run(0.5) == []
    assert unshared.dismissed == {"one"}


def test_a_fetch_for_which_the_lane_has_no_room_ends_and_the_next_one_follows(cluster: Cluster) -> None:
    """The broker itself asked, so nobody hears of it; nothing waits for its deadline."""
    cluster.join("two")
    driver = cluster.driver
    assert cluster.run(0.75) == []
    driver.now += 0.5
    (unsent,) = [send for send in driver.core.tick(driver.now) if send.call is not None]
    assert driver.core.inflight == 1
    (release,) = read(driver.core.on_unsent(unsent, is_gone=False))
    assert (release.link, type(release.message)) == (b"two", m.Release)
    driver.core.check()
    assert driver.core.inflight == 0
    assert warmed(cluster.run(0.5)) != []


@pytest.mark.parametrize("how", ["fails", "is late", "dies"])
def test_a_fetch_that_fails_is_nobodys_loss(cluster: Cluster, how: str) -> None:
    cluster.join("two")
    (_, assign) = cluster.run(3.0)
    if how == "fails":
        assert cluster.driver.reply(b"two", assign.message.call, wire.failed(bytes(16), WorkerLost("x"))) == []
    elif how == "is late":
        assert [it for it in cluster.run(DEADLINE_MS / 1000 + 0.5) if it.link == b"c1"] == []
    else:
        assert [it for it in cluster.driver.worker(b"two", m.Goodbye(reason="")) if it.link == b"c1"] == []
    cluster.driver.core.check()
    assert cluster.driver.stats().warmed_prompts == 0
    assert cluster.driver.core.inflight == (0 if how != "is late" else 1), "the next one follows"


def test_what_is_kept_is_bounded_and_the_least_recently_asked_for_goes_first() -> None:
    workers = Workers(1.0, 10)
    demand = Demand(workers, Knowledge(workers), lambda: bytes(16))
    message = generate(bytes(16))
    for number in range(2 * (MAX_BYTES // MAX_PROMPT_BYTES)):
        for _ in range(2):
            demand.asked(USER, RoutingKey(number.to_bytes(8, "big"), ""), message, bytes(MAX_PROMPT_BYTES), 0.0)
    assert demand.num_bytes == MAX_BYTES
    demand.asked(USER, RoutingKey(b"huge", ""), message, bytes(MAX_PROMPT_BYTES + 1), 0.0)
    demand.asked(USER, RoutingKey(b"huge", ""), message, bytes(MAX_PROMPT_BYTES + 1), 0.0)
    assert demand.num_bytes == MAX_BYTES
    demand.check()
