"""What libzmq delivers, refuses and loses. If an upgrade changes one of these, the code that leans on it must be
looked at again: it is named in each test."""

from __future__ import annotations

import errno
import time

import pytest
import zmq

from tests.zmq_semantics.conftest import Sockets, drain, error_of, events, receive, rings, until


def test_a_router_that_is_not_mandatory_loses_without_a_word(sockets: Sockets) -> None:
    """Why every Router of ours is mandatory."""
    router = sockets.bound(zmq.ROUTER, SNDHWM=10)
    assert error_of(lambda: router.send_multipart([b"nobody", b"x"], zmq.NOBLOCK)) is None

    stalled = sockets.connected(zmq.DEALER, RCVHWM=10)
    stalled.send(b"hello")
    link, _ = receive(router)
    for index in range(3000):
        router.send_multipart([link, b"%d" % index, bytes(5000)], zmq.NOBLOCK)
    assert 0 < len(drain(stalled)) < 2500


def test_a_mandatory_router_says_who_is_gone_and_who_is_full(sockets: Sockets) -> None:
    """Router.send: GONE and QUEUED. It finds out that a full peer is gone only if it reads, which ours always does."""
    router = sockets.bound(zmq.ROUTER, SNDHWM=1, ROUTER_MANDATORY=1)
    peer = sockets.connected(zmq.DEALER, RCVHWM=1)
    peer.send(b"hello")
    link, _ = receive(router)

    assert error_of(lambda: router.send_multipart([b"nobody", b"x"], zmq.NOBLOCK)) == errno.EHOSTUNREACH
    until(lambda: error_of(lambda: router.send_multipart([link, bytes(100_000)], zmq.NOBLOCK)) == errno.EAGAIN)
    peer.close(0)
    assert error_of(lambda: router.send_multipart([link, b"x"], zmq.NOBLOCK)) == errno.EAGAIN
    until(lambda: not router.poll(1) and _is_gone(router, link))


def _is_gone(router: zmq.Socket[bytes], link: bytes) -> bool:
    return error_of(lambda: router.send_multipart([link, b"x"], zmq.NOBLOCK)) == errno.EHOSTUNREACH


def test_a_message_is_refused_at_its_first_part_or_taken_whole(sockets: Sockets) -> None:
    """Socket._try_send takes Again for: nothing of it was sent."""
    router = sockets.bound(zmq.ROUTER, SNDHWM=1, ROUTER_MANDATORY=1)
    peer = sockets.connected(zmq.DEALER, RCVHWM=1)
    peer.send(b"hello")
    link, _ = receive(router)
    taken = 0
    while True:
        if error_of(lambda: router.send(link, zmq.NOBLOCK | zmq.SNDMORE)) == errno.EAGAIN:
            break
        for _ in range(20):
            router.send(bytes(10_000), zmq.NOBLOCK | zmq.SNDMORE)
        router.send(b"end", zmq.NOBLOCK)
        taken += 1
    messages = drain(peer)
    assert len(messages) == taken
    assert {len(message) for message in messages} == {21}


def test_messages_in_the_queues_of_a_peer_that_dies_are_lost_without_a_word(sockets: Sockets) -> None:
    """Why requests have deadlines, acknowledgements and retries: each hop delivers at most once."""
    first = sockets.bound(zmq.ROUTER, RCVHWM=1000)
    sender = sockets.connected(zmq.DEALER, IMMEDIATE=1, RECONNECT_IVL=10)
    until(lambda: error_of(lambda: sender.send(b"first", zmq.NOBLOCK)) is None)
    receive(first)
    for index in range(1000):
        sender.send(b"%d" % index)
    read = [receive(first)[1] for _ in range(10)]
    first.close(0)

    second = sockets.bound(zmq.ROUTER)
    until(lambda: error_of(lambda: sender.send(b"more", zmq.NOBLOCK)) is None and bool(second.poll(0)))
    messages = {message for _, message in drain(second)}

    assert read == [b"%d" % index for index in range(10)]
    assert messages == {b"more"}  # and no error told of the 990 others


def test_a_dealer_without_a_peer_refuses_at_once_if_it_is_immediate(sockets: Sockets) -> None:
    """Dealer: what cannot leave now waits in our own queue, whose bound we know."""
    lazy = sockets.connected(zmq.DEALER, SNDHWM=5)
    prompt = sockets.connected(zmq.DEALER, SNDHWM=5, IMMEDIATE=1)
    assert error_of(lambda: lazy.send(b"x", zmq.NOBLOCK)) is None
    assert error_of(lambda: prompt.send(b"x", zmq.NOBLOCK)) == errno.EAGAIN


@pytest.mark.parametrize("immediate", [0, 1])
def test_an_immediate_dealer_loses_what_it_has_not_read_when_its_connection_ends(
    sockets: Sockets, immediate: int
) -> None:
    """Why a broker waits a moment between its last words and the close."""
    router = sockets.bound(zmq.ROUTER)
    dealer = sockets.connected(zmq.DEALER, IMMEDIATE=immediate)
    until(lambda: error_of(lambda: dealer.send(b"hello", zmq.NOBLOCK)) is None)
    link, _ = receive(router)
    router.send_multipart([link, b"last words"])
    router.close(500)
    time.sleep(0.1)  # both have arrived by now: the words, and the end of the connection
    assert drain(dealer) == ([] if immediate else [[b"last words"]])


def test_the_first_of_two_peers_with_one_routing_id_leaves_the_second_unheard(sockets: Sockets) -> None:
    """Why we never choose routing ids: a worker that restarts would talk into the void."""
    router = sockets.bound(zmq.ROUTER)
    first = sockets.connected(zmq.DEALER, ROUTING_ID=b"worker")
    first.send(b"first")
    receive(router)
    second = sockets.connected(zmq.DEALER, ROUTING_ID=b"worker")
    assert error_of(lambda: second.send(b"second", zmq.NOBLOCK)) is None
    assert drain(router, 200) == []


def test_with_handover_whoever_claims_a_routing_id_takes_its_traffic(sockets: Sockets) -> None:
    router = sockets.bound(zmq.ROUTER, ROUTER_HANDOVER=1)
    victim = sockets.connected(zmq.DEALER, ROUTING_ID=b"worker")
    victim.send(b"first")
    receive(router)
    thief = sockets.connected(zmq.DEALER, ROUTING_ID=b"worker")
    thief.send(b"second")
    receive(router)
    router.send_multipart([b"worker", b"secret"])
    assert receive(thief) == [b"secret"]
    assert drain(victim) == []


def test_a_frame_beyond_the_limit_costs_the_connection_unseen(sockets: Sockets) -> None:
    """MAXMSGSIZE stands on every socket; the client checks sizes first, or it would see nothing but silence."""
    router = sockets.bound(zmq.ROUTER, MAXMSGSIZE=1000, ROUTER_MANDATORY=1)
    dealer = sockets.connected(zmq.DEALER, RECONNECT_IVL=-1)
    dealer.send(bytes(1000))
    link, _ = receive(router)
    dealer.send(bytes(1001))
    until(lambda: _is_gone(router, link))
    assert drain(router) == []


def test_the_limit_is_of_a_frame_and_not_of_a_message(sockets: Sockets) -> None:
    """So it bounds no memory by itself: a message may have any number of frames."""
    router = sockets.bound(zmq.ROUTER, MAXMSGSIZE=1000)
    dealer = sockets.connected(zmq.DEALER)
    dealer.send_multipart([bytes(1000)] * 500)
    assert len(receive(router)) == 501


@pytest.mark.parametrize("look", ["events", "send"])
def test_the_descriptor_tells_of_an_event_once(sockets: Sockets, look: str) -> None:
    """Why events are looked at again after every send: the descriptor stays quiet while a message lies there."""
    dealer = sockets.connected(zmq.DEALER)
    router = sockets.bound(zmq.ROUTER)
    dealer.send(b"hello")
    link, _ = receive(router)
    until(lambda: not events(router) & zmq.POLLIN and not rings(router))
    dealer.send(b"a message")
    until(lambda: rings(router))

    if look == "events":
        assert events(router) & zmq.POLLIN
    else:
        until(lambda: _send_and_look(router, link))

    assert not rings(router)
    assert events(router) & zmq.POLLIN
    assert router.recv_multipart(zmq.NOBLOCK) == [link, b"a message"]


def _send_and_look(router: zmq.Socket[bytes], link: bytes) -> bool:
    """Whether sending has silenced the descriptor. libzmq looks at its commands at some sends, not at each."""
    router.send_multipart([link, b"x"], zmq.NOBLOCK)
    return not rings(router)
