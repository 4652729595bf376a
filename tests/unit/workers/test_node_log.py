"""What a worker tells of its nodes, when, and in how many messages. That it adds up is tested with the broker's
feed, in tests/unit/kvcache/test_feeds.py."""

from __future__ import annotations

from bus import wire
from bus.limits import MAX_CHANGED_NODES
from bus.messages import NodeRun, NodesChanged, NodesHeld
from workers.node_log import NodeLog, Report
from workers.nodes import NodeChange


def node(number: int) -> bytes:
    return number.to_bytes(8, "big")


def stored(*numbers: int, tenant: str = "t") -> list[NodeChange]:
    return [NodeChange(tenant, node(number), True) for number in numbers]


def removed(*numbers: int, tenant: str = "t") -> list[NodeChange]:
    return [NodeChange(tenant, node(number), False) for number in numbers]


def joined(log: NodeLog) -> NodeLog:
    """With a broker on link 0 that knows all there is."""
    log.joined(0)
    while any(log.reports(0, now) for now in (0.0, 1.0)):
        pass
    return log


def reports(log: NodeLog, now: float, link: int = 0) -> list[Report]:
    """What is said now, and can be: a message that does not fit its frame would raise."""
    said = log.reports(link, now)
    for message, payload in said:
        assert wire.decode([wire.encode(message), payload]).message == message
    return said


def test_changes_within_20_ms_are_told_together() -> None:
    log = joined(NodeLog())
    log.note(stored(1))
    ((first, payload),) = reports(log, 10.0)
    assert isinstance(first, NodesChanged)
    assert (first.first, first.runs, payload) == (1, (NodeRun("t", True, 1),), node(1))
    log.note(stored(2, 3))
    log.note(removed(1))
    assert reports(log, 10.019) == []
    ((second, payload),) = reports(log, 10.021)
    assert isinstance(second, NodesChanged)
    assert (second.first, second.runs) == (2, (NodeRun("t", True, 2), NodeRun("t", False, 1)))
    assert payload == node(2) + node(3) + node(1)
    assert reports(log, 11.0) == []


def test_a_node_of_several_blocks_is_held_until_the_last_of_them_is_gone() -> None:
    log = joined(NodeLog())
    log.note([*stored(1), *stored(1), *removed(1)])
    assert [payload for _, payload in reports(log, 10.0)] == [node(1)]
    log.note([*removed(1), *stored(1), *removed(1)])
    ((message, _),) = reports(log, 11.0)
    assert isinstance(message, NodesChanged)
    assert [run.is_stored for run in message.runs] == [False, True, False]


def test_equal_nodes_of_two_tenants_are_two() -> None:
    log = joined(NodeLog())
    log.note([*stored(1, tenant="a"), *stored(1, tenant="b"), *removed(1, tenant="a")])
    reports(log, 10.0)
    log.joined(1)
    ((message, payload),) = reports(log, 10.0, link=1)
    assert isinstance(message, NodesHeld)
    assert (message.runs, payload) == ((NodeRun("b", True, 1),), node(1))


def test_a_report_holds_so_many_nodes_and_the_next_follows_20_ms_later() -> None:
    log = joined(NodeLog())
    log.note(stored(*range(MAX_CHANGED_NODES + 5)))
    told = [payload for now in (10.0, 10.03) for _, payload in reports(log, now)]
    assert [len(payload) // 8 for payload in told] == [MAX_CHANGED_NODES, 5]
    assert b"".join(told) == b"".join(map(node, range(MAX_CHANGED_NODES + 5)))


def test_tenants_with_long_names_are_told_in_as_many_messages_as_their_headers_need() -> None:
    log = joined(NodeLog())
    tenants = [f"{number:04}" + "\u00fc" * 252 for number in range(40)]
    for tenant in tenants:
        log.note(stored(1, tenant=tenant))
    told = [message for step in range(20) for message, _ in reports(log, 10.0 + step)]
    assert [run.tenant for message in told if isinstance(message, NodesChanged) for run in message.runs] == tenants
    log.asked(0, 0)
    told = [message for step in range(20) for message, _ in reports(log, 50.0 + step)]
    assert [run.tenant for message in told if isinstance(message, NodesHeld) for run in message.runs] == tenants


def test_the_number_that_a_beat_says_is_that_of_the_last_change_told_on_this_link() -> None:
    log = joined(NodeLog())
    log.note(stored(1, 2))
    assert log.sent(0) == 0
    reports(log, 10.0)
    assert (log.sent(0), log.sent(1)) == (2, 0)
    log.left(0)
    log.asked(0, 1)
    assert (log.sent(0), reports(log, 11.0)) == (0, [])


def test_a_question_nobody_can_have_is_answered_with_everything() -> None:
    log = joined(NodeLog())
    log.note(stored(1, 2))
    reports(log, 10.0)
    for after in (0, 3, 2**62):
        log.asked(0, after)
        assert [type(message) for message, _ in reports(log, 20.0)] == [NodesHeld]
        log.left(0)
        joined(log)
    log.asked(0, 1)
    ((message, payload),) = reports(log, 30.0)
    assert isinstance(message, NodesChanged)
    assert (message.first, payload) == (2, node(2))
