"""What workers report, as the broker understands it: whatever is lost, once it is repaired the index is the truth."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from bus.errors import MalformedMessage
from bus.messages import NodeRun, NodesChanged, NodesHeld
from kvcache.routing.feeds import PATIENCE_S, SNAPSHOTS, TRANSITIONS, Feed, Happening
from kvcache.routing.index import NodeIndex
from kvcache.routing.views import IndexState
from workers.node_log import NodeLog, Report
from workers.nodes import NodeChange


def node(number: int) -> bytes:
    return number.to_bytes(8, "little")


def change(number: int, *, is_stored: bool = True, tenant: str = "t") -> NodeChange:
    return NodeChange(tenant, node(number), is_stored)


class Link:
    """One worker's log and the broker's feed of it, with a channel between that a test may tear."""

    def __init__(self, index: NodeIndex | None = None, *, name: str = "w", log_changes: int = 1000) -> None:
        self.index = NodeIndex() if index is None else index
        self.name = name
        self.now = 100.0
        self.log = NodeLog(log_changes=log_changes)
        self.wire: deque[Report] = deque()
        self.join()

    def join(self) -> None:
        self.feed = Feed(self.index, self.name, self.now)
        self.wire.clear()
        self.log.joined(0)

    def state(self) -> IndexState:
        return self.feed.state

    def say(self, *changes: NodeChange) -> None:
        self.log.note(changes)
        self.pump()

    def pump(self) -> None:
        """The worker's reports that are due are on the wire."""
        self.now += 0.02
        self.wire.extend(self.log.reports(0, self.now))

    def deliver(self) -> None:
        while self.wire:
            self.hear(self.wire.popleft())

    def hear(self, report: Report) -> None:
        message, payload = report
        if isinstance(message, NodesHeld):
            self.feed.held(message, payload, self.now)
        else:
            assert isinstance(message, NodesChanged)
            self.feed.changed(message, payload, self.now)

    def ask(self) -> int | None:
        after = self.feed.ask(self.now)
        if after is not None:
            self.log.asked(0, after)
        return after

    def settle(self) -> None:
        """Let everything arrive that is said and asked, and time for a beat."""
        for _ in range(80):
            self.pump()
            self.deliver()
            self.feed.told(self.log.sent(0), self.now)
            self.ask()
            self.now += PATIENCE_S / 8

    def knows(self, numbers: range | set[int], tenant: str = "t") -> set[int]:
        return {n for n in numbers if self.index.lookup([node(n)], tenant).get(self.name)}


def test_a_worker_is_blind_until_it_has_told_what_it_holds() -> None:
    link = Link()
    assert (link.state(), link.feed.num_nodes) == (IndexState.BLIND, 0)
    link.log.note([change(1), change(2)])
    link.settle()
    assert link.state() is IndexState.EXACT
    assert link.knows(range(4)) == {1, 2}
    link.say(change(3), change(1, is_stored=False))
    link.deliver()
    assert link.knows(range(4)) == {2, 3}
    assert link.feed.num_nodes == 2


def test_a_lost_report_is_noticed_by_its_number_and_told_again_from_the_log() -> None:
    link = Link()
    link.settle()
    link.say(change(1))
    link.deliver()
    link.say(change(2), change(1, is_stored=False))
    link.wire.clear()
    link.say(change(3))
    link.deliver()
    assert link.state() is IndexState.DEGRADED
    assert link.knows(range(5)) == {1}  # what came after the gap waits for its repair
    assert link.ask() == 1
    assert link.ask() is None
    link.pump()
    assert [type(message) for message, _ in link.wire] == [NodesChanged]
    link.deliver()
    assert link.state() is IndexState.EXACT
    assert link.knows(range(5)) == {2, 3}
    assert link.feed.num_gaps == 1


def test_a_lost_last_report_is_noticed_by_the_beat() -> None:
    link = Link()
    link.settle()
    link.say(change(1))
    link.deliver()
    link.say(change(2))
    link.wire.clear()
    assert link.state() is IndexState.EXACT
    link.feed.told(link.log.sent(0), link.now)
    assert link.state() is IndexState.DEGRADED
    link.settle()
    assert (link.state(), link.knows(range(4))) == (IndexState.EXACT, {1, 2})


def test_what_the_log_has_forgotten_is_repaired_by_telling_everything() -> None:
    link = Link(log_changes=3)
    link.settle()
    for number in range(10):
        link.say(change(number))
    link.wire.clear()
    link.say(change(10), change(0, is_stored=False))
    link.deliver()
    assert link.ask() is not None
    link.pump()
    assert {type(message) for message, _ in link.wire} == {NodesHeld}
    link.deliver()
    assert (link.state(), link.knows(range(12))) == (IndexState.EXACT, set(range(1, 11)))


def test_a_broker_that_is_slow_to_take_changes_is_told_everything_when_the_log_has_moved_on() -> None:
    link = Link(log_changes=3)
    link.settle()
    link.log.note(change(number) for number in range(50))
    link.settle()
    assert (link.state(), link.knows(range(60))) == (IndexState.EXACT, set(range(50)))


def test_a_snapshot_that_is_interrupted_leaves_what_was_known_and_is_asked_for_again() -> None:
    link = Link()
    link.settle()
    link.say(change(1))
    link.deliver()
    link.log.note(change(number) for number in range(2, 30_000))
    link.log.asked(0, 0)
    link.pump()
    assert [message.part for message, _ in link.wire if isinstance(message, NodesHeld)] == [0, 1, 2, 3]
    del link.wire[2]
    for _ in range(4):  # the parts that follow, the last one among them, do not make it whole
        link.deliver()
        link.pump()
    assert link.state() is IndexState.DEGRADED
    assert link.knows(range(4)) == {1}
    link.now += PATIENCE_S
    assert link.ask() is not None
    link.settle()
    assert link.state() is IndexState.EXACT
    assert link.knows(range(30_010)) == set(range(1, 30_000))
    link.index.check()


def test_the_first_snapshot_is_of_use_before_it_is_whole() -> None:
    link = Link()
    link.log.note(change(number) for number in range(30_000))
    link.log.joined(0)
    link.pump()
    link.hear(link.wire.popleft())
    assert link.state() is IndexState.DEGRADED
    assert link.knows({0, 1, 29_999}) == {0, 1}
    link.settle()
    assert link.state() is IndexState.EXACT
    assert link.knows({0, 1, 29_999}) == {0, 1, 29_999}


def test_a_worker_that_says_nothing_is_asked() -> None:
    link = Link()
    assert link.ask() is None
    link.now += PATIENCE_S
    assert link.ask() == 0
    assert link.ask() is None


def test_a_worker_that_is_gone_is_found_nowhere_and_its_successor_begins_blind() -> None:
    link = Link()
    link.log.note([change(1)])
    link.settle()
    link.feed.close()
    assert link.knows({1}) == set()
    link.log = NodeLog()  # a restart: another incarnation, an empty cache, numbers from 1 on
    link.join()
    assert link.state() is IndexState.BLIND
    link.say(change(2))
    link.settle()
    assert (link.state(), link.knows({1, 2})) == (IndexState.EXACT, {2})
    link.index.sweep()
    link.index.check()


def test_a_worker_with_more_than_its_share_is_degraded_and_whole_again_when_there_is_room() -> None:
    index = NodeIndex(max_entries=100)
    first, second = Link(index, name="first"), Link(index, name="second")
    for link in (first, second):
        link.settle()
    first.say(*map(change, range(90)))
    first.settle()
    assert first.state() is IndexState.DEGRADED
    assert first.feed.num_nodes == 50
    second.say(*map(change, range(1000, 1040)))
    second.settle()
    assert (second.state(), second.feed.num_nodes) == (IndexState.EXACT, 40)  # nobody else is harmed
    second.feed.close()
    first.say(change(90))
    first.say(*(change(number, is_stored=False) for number in range(20)))
    first.settle()
    assert (first.state(), first.knows(range(100))) == (IndexState.EXACT, set(range(20, 91)))
    index.sweep()
    index.check()


def test_who_was_within_its_share_before_others_joined_gives_the_rest_back() -> None:
    index = NodeIndex(max_entries=100)
    first = Link(index, name="first")
    first.say(*map(change, range(80)))
    first.settle()
    assert first.state() is IndexState.EXACT
    second = Link(index, name="second")
    second.settle()
    first.say(change(80))
    first.settle()
    assert (first.state(), first.feed.num_nodes) == (IndexState.DEGRADED, 50)


@pytest.mark.parametrize("nodes", [b"", b"x" * 7, b"x" * 16])
def test_nodes_that_are_not_as_many_as_said_are_malformed_and_change_nothing(nodes: bytes) -> None:
    link = Link()
    link.say(change(1))
    link.settle()
    with pytest.raises(MalformedMessage, match="nodes"):
        link.feed.changed(NodesChanged(first=2, runs=(NodeRun("t", True, 1),), payload=()), nodes, link.now)
    held = NodesHeld(after=9, part=0, is_last=True, runs=(NodeRun("t", True, 1),), payload=())
    with pytest.raises(MalformedMessage, match="nodes"):
        link.feed.held(held, nodes, link.now)
    removed = NodesHeld(after=9, part=0, is_last=True, runs=(NodeRun("t", False, 1),), payload=())
    with pytest.raises(MalformedMessage, match="removed"):
        link.feed.held(removed, b"x" * 8, link.now)
    assert (link.state(), link.knows({1})) == (IndexState.EXACT, {1})


def test_absurd_numbers_harm_the_worker_that_sends_them_and_no_other() -> None:
    index = NodeIndex()
    good, bad = Link(index, name="good"), Link(index, name="bad")
    for link in (good, bad):
        link.say(change(1))
        link.settle()
    runs = (NodeRun("t", True, 1),)
    bad.feed.changed(NodesChanged(first=2**62, runs=runs, payload=()), node(1), bad.now)
    bad.feed.held(NodesHeld(after=2**62, part=7, is_last=True, runs=runs, payload=()), node(1), bad.now)
    bad.feed.told(2**62, bad.now)
    assert (bad.state(), good.state()) == (IndexState.DEGRADED, IndexState.EXACT)
    assert good.knows({1}) == {1}
    bad.feed.held(NodesHeld(after=2**62, part=0, is_last=True, runs=(), payload=()), b"", bad.now)
    assert bad.knows({1}) == set()
    assert good.knows({1}) == {1}


def test_a_worker_that_tells_everything_all_the_time_is_heard_now_and_then() -> None:
    link = Link()
    link.say(*map(change, range(9)))
    link.settle()
    runs = (NodeRun("t", True, 1),)
    told = set()
    for number in range(100, 1100):  # a thousand snapshots in ten seconds
        link.feed.held(NodesHeld(after=number, part=0, is_last=True, runs=runs, payload=()), node(number), link.now)
        told |= link.knows({number})
        link.now += 0.01
    assert SNAPSHOTS + 9 <= len(told) <= SNAPSHOTS + 10
    link.settle()
    assert (link.state(), link.knows(set(range(9)) | told)) == (IndexState.EXACT, set(range(9)))
    link.index.sweep()
    link.index.check()


def test_every_state_knows_what_can_happen_to_it() -> None:
    unknown = {(IndexState.BLIND, Happening.REPAIRED), (IndexState.BLIND, Happening.CUT)}
    everything = {(state, happening) for state in IndexState for happening in Happening}
    assert TRANSITIONS.keys() == everything - unknown


class FeedMachine(RuleBasedStateMachine):
    """Two workers, one index: any order of changes, losses, asks, restarts and time. At the end all is repaired."""

    def __init__(self) -> None:
        super().__init__()
        self.index = NodeIndex()
        self.links = [Link(self.index, name=name, log_changes=8) for name in ("a", "b")]
        self.held: list[set[int]] = [set(), set()]

    @rule(at=st.integers(0, 1), numbers=st.lists(st.integers(0, 20), max_size=12), say=st.booleans())
    def cache_changes(self, at: int, numbers: list[int], say: bool) -> None:
        for number in numbers:
            self.links[at].log.note([change(number, is_stored=number not in self.held[at])])
            self.held[at] ^= {number}
        if say:
            self.links[at].pump()

    @rule(at=st.integers(0, 1), which=st.integers(0, 5))
    def a_report_is_lost(self, at: int, which: int) -> None:
        wire = self.links[at].wire
        if which < len(wire):
            del wire[which]

    @rule(at=st.integers(0, 1))
    def reports_arrive(self, at: int) -> None:
        self.links[at].deliver()

    @rule(at=st.integers(0, 1))
    def a_beat_arrives(self, at: int) -> None:
        link = self.links[at]
        if not link.wire:
            link.feed.told(link.log.sent(0), link.now)

    @rule(at=st.integers(0, 1), seconds=st.sampled_from([0.0, 0.5, 2.0]))
    def the_broker_asks(self, at: int, seconds: float) -> None:
        self.links[at].now += seconds
        self.links[at].ask()

    @rule(at=st.integers(0, 1))
    def a_worker_restarts(self, at: int) -> None:
        link = self.links[at]
        link.feed.close()
        link.log, self.held[at] = NodeLog(log_changes=8), set()
        link.join()

    @rule(at=st.integers(0, 1))
    def a_session_begins_anew(self, at: int) -> None:
        self.links[at].feed.close()
        self.links[at].join()

    @rule(budget=st.integers(1, 300))
    def the_index_is_swept(self, budget: int) -> None:
        self.index.sweep(budget)

    @invariant()
    def the_index_agrees_with_itself(self) -> None:
        self.index.check()

    def teardown(self) -> None:
        for link, held in zip(self.links, self.held, strict=True):
            link.settle()
            assert link.state() is IndexState.EXACT
            assert link.knows(range(21)) == held
            link.feed.close()
        assert self.index.lookup([node(0)], "t") == {}


FeedMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestFeedMachine = FeedMachine.TestCase
