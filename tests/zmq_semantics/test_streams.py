"""What PUB loses, and how a manual XPUB hands out approvals: streams and their secrecy rest on it."""

from __future__ import annotations

import time
from itertools import pairwise

import zmq

from tests.zmq_semantics.conftest import Sockets, drain, events, receive, until

TOPIC = b"S|victim"


def test_what_a_publisher_drops_is_whole_messages_in_few_long_bursts(sockets: Sockets) -> None:
    """Why a client holds back 256 messages and asks for the hole: sequence numbers reveal it, and it is a hole."""
    total = 20_000
    publisher = sockets.bound(zmq.PUB, SNDHWM=100)
    subscriber = sockets.connected(zmq.SUB, RCVHWM=100, SUBSCRIBE=b"")
    until(lambda: _arrives(publisher, subscriber))
    drain(subscriber)

    received = []
    for index in range(total):
        publisher.send_multipart([b"topic", b"%d" % index, bytes(1000)])
        if index % 3000 == 2999:  # a reader that comes by now and then
            received += drain(subscriber, 20)
    received += drain(subscriber)

    numbers = [int(message[1]) for message in received]
    holes = [after - before - 1 for before, after in pairwise(numbers) if after != before + 1]
    assert {len(message) for message in received} == {3}
    assert numbers == sorted(numbers)
    assert 0 < len(holes) < 50
    assert max(holes) > 500


def _arrives(publisher: zmq.Socket[bytes], subscriber: zmq.Socket[bytes]) -> bool:
    publisher.send_multipart([b"topic", b"0", b""])
    return bool(subscriber.poll(5))


def test_what_is_published_before_the_subscription_has_arrived_is_lost(sockets: Sockets) -> None:
    """Why a client waits for SubAck before it generates."""
    publisher = sockets.bound(zmq.PUB)
    publisher.send(b"early")
    subscriber = sockets.connected(zmq.SUB, SUBSCRIBE=b"")
    publisher.send(b"early still")
    assert drain(subscriber, 100) == []


def test_a_manual_hub_shows_nothing_to_who_was_not_approved(sockets: Sockets) -> None:
    """A filter is a prefix: the empty one and any beginning of a topic would match it."""
    hub = sockets.bound(zmq.XPUB, XPUB_MANUAL=1)
    snoops = [sockets.connected(zmq.SUB, SUBSCRIBE=prefix) for prefix in (b"", b"S|", TOPIC)]
    assert sorted(drain(hub, 200)) == [[b"\x01"], [b"\x01S|"], [b"\x01" + TOPIC]]
    hub.send(TOPIC + b" secret")
    assert [drain(snoop) for snoop in snoops] == [[], [], []]


def test_each_peer_is_asked_for_even_if_another_has_the_same_topic(sockets: Sockets) -> None:
    hub = sockets.bound(zmq.XPUB, XPUB_MANUAL=1)
    first = sockets.connected(zmq.SUB, SUBSCRIBE=TOPIC)
    assert receive(hub) == [b"\x01" + TOPIC]
    hub.setsockopt(zmq.SUBSCRIBE, TOPIC)
    second = sockets.connected(zmq.SUB, SUBSCRIBE=TOPIC)
    assert receive(hub) == [b"\x01" + TOPIC]
    hub.send(TOPIC)
    assert receive(first) == [TOPIC]
    assert drain(second) == []


def test_an_approval_goes_to_the_peer_whose_request_was_read_last(sockets: Sockets) -> None:
    """StreamHub decides each request before it reads the next."""
    hub = sockets.bound(zmq.XPUB, XPUB_MANUAL=1)
    first = sockets.connected(zmq.SUB, SUBSCRIBE=b"S|")
    assert receive(hub) == [b"\x01S|"]
    second = sockets.connected(zmq.SUB, SUBSCRIBE=TOPIC)
    assert receive(hub) == [b"\x01" + TOPIC]
    hub.setsockopt(zmq.SUBSCRIBE, TOPIC)
    hub.send(TOPIC)
    assert receive(second) == [TOPIC]
    assert drain(first) == []


def test_data_flows_on_after_an_unsubscription_that_is_not_repeated(sockets: Sockets) -> None:
    """StreamHub repeats it. An XSUB shows what a SUB would filter out."""
    hub = sockets.bound(zmq.XPUB, XPUB_MANUAL=1)
    peer = sockets.connected(zmq.XSUB)
    peer.send(b"\x01" + TOPIC)
    receive(hub)
    hub.setsockopt(zmq.SUBSCRIBE, TOPIC)
    peer.send(b"\x00" + TOPIC)
    assert receive(hub) == [b"\x00" + TOPIC]
    hub.send(TOPIC)
    assert receive(peer) == [TOPIC]
    hub.setsockopt(zmq.UNSUBSCRIBE, TOPIC)
    hub.send(TOPIC)
    assert drain(peer) == []


def test_a_peer_that_left_was_unsubscribed_and_harms_no_approval(sockets: Sockets) -> None:
    hub = sockets.bound(zmq.XPUB, XPUB_MANUAL=1)
    gone = sockets.connected(zmq.SUB, SUBSCRIBE=b"S|gone")
    receive(hub)
    hub.setsockopt(zmq.SUBSCRIBE, b"S|gone")
    gone.close(0)
    assert receive(hub) == [b"\x00S|gone"]
    hub.setsockopt(zmq.UNSUBSCRIBE, b"S|gone")
    here = sockets.connected(zmq.SUB, SUBSCRIBE=TOPIC)
    receive(hub)
    hub.setsockopt(zmq.SUBSCRIBE, TOPIC)
    hub.send(TOPIC)
    assert receive(here) == [TOPIC]


def test_a_message_that_is_no_request_shifts_approvals_to_the_next_peer(sockets: Sockets) -> None:
    """A flaw of libzmq 4.3.5, and why StreamHub refuses everything from such a message on until it has read all:
    the queue of peers that asked is advanced for each message read, though this one put no peer into it."""
    hub = sockets.bound(zmq.XPUB, XPUB_MANUAL=1)
    stray, victim, thief = (sockets.connected(zmq.XSUB) for _ in range(3))
    for peer in (stray, victim, thief):
        peer.send(b"\x01connected")
        receive(hub)

    stray.send(b"no request")
    _let_arrive(hub)
    victim.send(b"\x01" + TOPIC)
    _let_arrive(hub)
    thief.send(b"\x01S|vic")
    _let_arrive(hub)
    assert receive(hub) == [b"no request"]
    assert receive(hub) == [b"\x01" + TOPIC]
    hub.setsockopt(zmq.SUBSCRIBE, TOPIC)
    hub.send(TOPIC + b" secret")

    assert receive(thief) == [TOPIC + b" secret"]
    assert drain(victim) == []


def _let_arrive(hub: zmq.Socket[bytes]) -> None:
    """Have libzmq take in what was sent, unread. With a message waiting already, it shows no sign of the next."""
    time.sleep(0.05)
    events(hub)
