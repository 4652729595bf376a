"""Sockets over loopback: what a send reports, what an overfull or vanished peer does, who may read a stream."""

from __future__ import annotations

import asyncio
import socket as stdlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from bus import sockets
from bus.errors import BadArgument, ConnectionLost, Forbidden
from bus.security import SecurityConfig
from bus.sockets import CONTROL, TOKENS, Context, Dealer, Lane, Publisher, Router, Sent, StreamHub, Subscriber
from bus.topics import topic_of

SECURITY = SecurityConfig()
WAIT_S = 30.0
NARROW = Lane(send_hwm=1, receive_hwm=1, max_message_bytes=1 << 20, queue_limit=8, silence_ms=1500)


class Inbox:
    """Collects what a socket hands out, and lets a test wait for it."""

    def __init__(self) -> None:
        self.messages: list[list[bytes]] = []
        self._arrived = asyncio.Event()

    def __call__(self, batch: list[sockets.Message]) -> None:
        self.messages += [[bytes(frame) for frame in message] for message in batch]
        self._arrived.set()

    async def upto(self, count: int) -> list[list[bytes]]:
        """All messages, once there are `count`."""
        await until(lambda: len(self.messages) >= count, self._arrived)
        return self.messages


async def until(is_so: Callable[[], bool], event: asyncio.Event | None = None) -> None:
    """Wait until something holds: look when `event` is set, or every few milliseconds."""
    async with asyncio.timeout(WAIT_S):
        while not is_so():
            if event is None:
                await asyncio.sleep(0.002)
            else:
                event.clear()
                await event.wait()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def context(stack: ExitStack) -> Context:
    return stack.enter_context(Context())


@pytest.fixture
def address(stack: ExitStack) -> str:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    return f"ipc://{Path(folder) / 's'}"


class Pair:
    """A router with an inbox, and dealers that connect to it."""

    def __init__(self, context: Context, stack: ExitStack, address: str, lane: Lane = CONTROL) -> None:
        self.inbox = Inbox()
        self.router = stack.enter_context(Router(context, lane, SECURITY, self.inbox))
        self.router.bind(address)
        self.router.start()
        self._context, self._stack, self._address, self._lane = context, stack, address, lane

    def dealer(self, on_batch: Callable[[list[sockets.Message]], None], lane: Lane | None = None) -> Dealer:
        dealer = self._stack.enter_context(Dealer(self._context, lane or self._lane, SECURITY, on_batch))
        dealer.connect(self._address)
        return dealer

    async def link_of(self, dealer: Dealer) -> bytes:
        """The routing id of a dealer, which says one word for it."""
        before = len(self.inbox.messages)
        dealer.start()
        dealer.send([b"hello"])
        return (await self.inbox.upto(before + 1))[-1][0]


# --- requests and answers ------------------------------------------------------------------------


async def test_a_message_and_its_answer_pass_whole_and_in_order(
    context: Context, stack: ExitStack, address: str
) -> None:
    pair, answers = Pair(context, stack, address), Inbox()
    dealer = pair.dealer(answers)
    link = await pair.link_of(dealer)

    for index in range(1000):
        assert dealer.send([b"a", b"", b"%d" % index]) in {Sent.DONE, Sent.QUEUED}
    received = await pair.inbox.upto(1001)
    for index in range(1000):
        assert pair.router.send(link, [b"%d" % index, b"x"]) in {Sent.DONE, Sent.QUEUED}

    assert received[1:] == [[link, b"a", b"", b"%d" % index] for index in range(1000)]
    assert await answers.upto(1000) == [[b"%d" % index, b"x"] for index in range(1000)]


async def test_what_is_sent_before_anybody_is_there_waits_for_them(
    context: Context, stack: ExitStack, address: str
) -> None:
    inbox = Inbox()
    dealer = stack.enter_context(Dealer(context, CONTROL, SECURITY, Inbox()))
    dealer.connect(address)
    assert [dealer.send([b"%d" % index]) for index in range(3)] == [Sent.QUEUED] * 3
    dealer.start()

    router = stack.enter_context(Router(context, CONTROL, SECURITY, inbox))
    router.bind(address)
    router.start()

    assert [message[1] for message in await inbox.upto(3)] == [b"0", b"1", b"2"]
    assert dealer.queued == 0


async def test_a_full_queue_refuses_at_once_and_counts(context: Context, stack: ExitStack, address: str) -> None:
    dealer = stack.enter_context(Dealer(context, NARROW, SECURITY, Inbox()))
    dealer.connect(address)
    dealer.start()

    outcomes = [dealer.send([b"x"]) for _ in range(NARROW.queue_limit + 2)]

    assert outcomes == [Sent.QUEUED] * NARROW.queue_limit + [Sent.FULL] * 2
    assert dealer.dropped == 2
    dealer.forget_queue()
    assert dealer.queued == 0


async def test_what_was_queued_leaves_in_order_and_what_was_refused_never_does(
    context: Context, stack: ExitStack, address: str
) -> None:
    pair = Pair(context, stack, address, NARROW)
    raw = context.raw(zmq.DEALER)  # a peer that says hello and then does not read
    stack.callback(raw.close, 0)
    raw.setsockopt(zmq.RCVHWM, 1)
    raw.connect(address)
    raw.send(b"hello")
    link = (await pair.inbox.upto(1))[0][0]

    accepted, outcomes, index = list[bytes](), set[Sent](), 0
    while Sent.FULL not in outcomes:
        body = b"%06d" % index + bytes(100_000)
        outcome = pair.router.send(link, [body])
        outcomes.add(outcome)
        if outcome is not Sent.FULL:
            accepted.append(body[:6])
        index += 1
        await asyncio.sleep(0)
    received = list[bytes]()

    def read() -> bool:
        while raw.poll(0):
            received.append(raw.recv()[:6])
        return len(received) >= len(accepted)

    await until(read)
    assert outcomes == {Sent.DONE, Sent.QUEUED, Sent.FULL}
    assert received == accepted
    assert pair.router.queued == 0
    assert pair.router.dropped == 1


async def test_one_stalled_peer_does_not_hold_up_another(context: Context, stack: ExitStack, address: str) -> None:
    pair, answers = Pair(context, stack, address, NARROW), Inbox()
    stalled = context.raw(zmq.DEALER)
    stack.callback(stalled.close, 0)
    stalled.setsockopt(zmq.RCVHWM, 1)
    stalled.connect(address)
    stalled.send(b"hello")
    link = (await pair.inbox.upto(1))[0][0]
    other = await pair.link_of(pair.dealer(answers))

    await until(lambda: pair.router.send(link, [bytes(100_000)]) is Sent.FULL)
    pair.router.send(other, [b"for you"])

    assert await answers.upto(1) == [[b"for you"]]


async def test_a_peer_that_never_was_or_has_left_is_gone(context: Context, stack: ExitStack, address: str) -> None:
    pair = Pair(context, stack, address)
    dealer = pair.dealer(Inbox())
    link = await pair.link_of(dealer)
    assert pair.router.send(b"nobody", [b"x"]) is Sent.GONE
    assert pair.router.send(b"", [b"x"]) is Sent.GONE
    assert pair.router.send(link, [b"x"]) is Sent.DONE

    dealer.close()

    await until(lambda: pair.router.send(link, [b"x"]) is Sent.GONE)


async def test_what_waits_for_a_peer_is_let_go_when_it_leaves(context: Context, stack: ExitStack, address: str) -> None:
    pair = Pair(context, stack, address, NARROW)
    stalled = context.raw(zmq.DEALER)
    stalled.setsockopt(zmq.RCVHWM, 1)
    stalled.connect(address)
    stalled.send(b"hello")
    link = (await pair.inbox.upto(1))[0][0]
    await until(lambda: pair.router.send(link, [bytes(100_000)]) is Sent.FULL)

    stalled.close(0)

    await until(lambda: pair.router.queued == 0)
    assert pair.router.send(link, [b"x"]) is Sent.GONE


async def test_an_oversized_frame_costs_its_sender_the_connection_and_nobody_else(
    context: Context, stack: ExitStack, address: str
) -> None:
    small = replace(CONTROL, max_message_bytes=1000)
    pair, answers = Pair(context, stack, address, small), Inbox()
    hostile, honest = pair.dealer(Inbox(), CONTROL), pair.dealer(answers, CONTROL)
    hostile_link, honest_link = await pair.link_of(hostile), await pair.link_of(honest)

    hostile.send([bytes(1001)])

    await until(lambda: pair.router.send(hostile_link, [b"x"]) is Sent.GONE)
    honest.send([bytes(1000)])
    assert (await pair.inbox.upto(3))[-1] == [honest_link, bytes(1000)]
    assert pair.router.send(honest_link, [b"x"]) is Sent.DONE


async def test_floods_in_both_directions_never_stop(context: Context, stack: ExitStack, address: str) -> None:
    """The descriptor tells of an event once, and a send can swallow the telling: then a socket would sleep for ever."""
    count, started, seen = 30_000, 0, [0, 0]
    finished = asyncio.Event()

    def at_router(batch: list[sockets.Message]) -> None:
        for link, body in batch:
            seen[0] += 1
            assert router.send(bytes(link), [body]) in {Sent.DONE, Sent.QUEUED}

    def at_dealer(batch: list[sockets.Message]) -> None:
        seen[1] += len(batch)
        for _ in batch:
            feed()
        if seen[1] == count:
            finished.set()

    def feed() -> None:
        nonlocal started
        if started < count:
            started += 1
            assert dealer.send([b"%d" % started]) in {Sent.DONE, Sent.QUEUED}

    router = stack.enter_context(Router(context, CONTROL, SECURITY, at_router))
    dealer = stack.enter_context(Dealer(context, CONTROL, SECURITY, at_dealer))
    router.bind(address)
    dealer.connect(address)
    router.start()
    dealer.start()
    for _ in range(300):  # more than one batch, so that both sides send while they receive
        feed()
    async with asyncio.timeout(WAIT_S):
        await finished.wait()
    assert seen == [count, count]


async def test_a_send_outside_a_batch_does_not_hide_what_has_arrived(
    context: Context, stack: ExitStack, address: str
) -> None:
    """Messages come in while the loop is busy; the send that follows looks at the socket's commands first."""
    pair, answers = Pair(context, stack, address), Inbox()
    dealer = pair.dealer(answers)
    link = await pair.link_of(dealer)

    for turn in range(200):
        pair.router.send(link, [b"answer"])
        dealer.send([b"question"])
        await answers.upto(turn + 1)
    await pair.inbox.upto(201)


async def test_large_frames_arrive_as_views_that_cannot_be_written(
    context: Context, stack: ExitStack, address: str
) -> None:
    received: list[sockets.Message] = []
    arrived = asyncio.Event()

    def keep(batch: list[sockets.Message]) -> None:
        received.extend(batch)
        arrived.set()

    router = stack.enter_context(Router(context, sockets.BULK, SECURITY, keep))
    router.bind(address)
    router.start()
    dealer = stack.enter_context(Dealer(context, sockets.BULK, SECURITY, Inbox()))
    dealer.connect(address)
    dealer.start()
    data = bytes(range(256)) * 4096
    dealer.send([b"header", memoryview(data)])
    await until(lambda: bool(received), arrived)

    _, header, view = received[0]
    assert header == b"header"
    assert isinstance(view, memoryview)
    assert view.readonly
    assert view == data


async def test_a_socket_may_be_closed_by_its_own_callback(context: Context, stack: ExitStack, address: str) -> None:
    closed = asyncio.Event()

    def close(batch: list[sockets.Message]) -> None:
        router.close()
        closed.set()

    router = stack.enter_context(Router(context, CONTROL, SECURITY, close))
    router.bind(address)
    router.start()
    dealer = stack.enter_context(Dealer(context, CONTROL, SECURITY, Inbox()))
    dealer.connect(address)
    dealer.start()
    dealer.send([b"bye"])
    async with asyncio.timeout(WAIT_S):
        await closed.wait()
    await asyncio.sleep(0)
    router.close()


async def test_an_exception_in_a_callback_does_not_deafen_the_socket(
    context: Context, stack: ExitStack, address: str
) -> None:
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context["exception"]))
    heard = asyncio.Event()

    def fail_once(batch: list[sockets.Message]) -> None:
        if not errors:
            raise RuntimeError("bug")
        heard.set()

    router = stack.enter_context(Router(context, CONTROL, SECURITY, fail_once))
    router.bind(address)
    router.start()
    dealer = stack.enter_context(Dealer(context, CONTROL, SECURITY, Inbox()))
    dealer.connect(address)
    dealer.start()
    dealer.send([b"one"])
    await until(lambda: bool(errors))
    dealer.send([b"two"])
    async with asyncio.timeout(WAIT_S):
        await heard.wait()


# --- addresses -----------------------------------------------------------------------------------


def test_a_bind_that_others_could_reach_is_refused_without_keys(context: Context, stack: ExitStack) -> None:
    router = stack.enter_context(Router(context, CONTROL, SECURITY, lambda batch: None))
    with pytest.raises(Forbidden):
        router.bind("tcp://0.0.0.0:5555")


def test_a_socket_more_than_the_process_may_have_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bus.sockets.libzmq.MAX_SOCKETS", 1)
    with (
        Context() as context,
        Dealer(context, CONTROL, SECURITY, Inbox()),
        pytest.raises(ConnectionLost, match="cannot open a socket: Too many open files"),
    ):
        Dealer(context, CONTROL, SECURITY, Inbox())


def test_a_taken_address_is_named(context: Context, stack: ExitStack) -> None:
    router = stack.enter_context(Router(context, CONTROL, SECURITY, lambda batch: None))
    other = stack.enter_context(stdlib.create_server(("127.0.0.1", 0)))
    with pytest.raises(ConnectionLost, match=r"cannot bind tcp://127.*in use"):
        router.bind(f"tcp://127.0.0.1:{other.getsockname()[1]}")


def test_an_ipc_path_that_is_served_is_not_taken_from_under_its_owner(
    context: Context, stack: ExitStack, address: str
) -> None:
    first, second = (stack.enter_context(Router(context, CONTROL, SECURITY, lambda batch: None)) for _ in range(2))
    first.bind(address)
    with pytest.raises(ConnectionLost, match="another process serves it"):
        second.bind(address)


def test_an_ipc_path_that_a_dead_process_left_behind_is_taken(context: Context, stack: ExitStack, address: str) -> None:
    with stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_STREAM) as dead:
        dead.bind(address.removeprefix("ipc://"))
    stack.enter_context(Router(context, CONTROL, SECURITY, lambda batch: None)).bind(address)


@pytest.mark.parametrize("endpoint", ["tcp://a b:1", "tcp://user@host:1", "ipc://" + "x" * 200])
def test_an_address_that_cannot_be_connected_to_is_named(context: Context, stack: ExitStack, endpoint: str) -> None:
    dealer = stack.enter_context(Dealer(context, CONTROL, SECURITY, lambda batch: None))
    with pytest.raises(BadArgument, match="no address to connect to"):
        dealer.connect(endpoint)


def _has_ipv6() -> bool:
    try:
        with stdlib.socket(stdlib.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="no IPv6 loopback on this machine")
async def test_an_ipv6_literal_works(context: Context, stack: ExitStack) -> None:
    inbox = Inbox()
    router = stack.enter_context(Router(context, CONTROL, SECURITY, inbox))
    with stdlib.socket(stdlib.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = probe.getsockname()[1]
    router.bind(f"tcp://[::1]:{port}")
    router.start()
    dealer = stack.enter_context(Dealer(context, CONTROL, SECURITY, Inbox()))
    dealer.connect(f"tcp://[::1]:{port}")
    dealer.start()
    dealer.send([b"x"])
    assert (await inbox.upto(1))[0][1] == b"x"


# --- streams -------------------------------------------------------------------------------------

OPEN, OTHER = topic_of(b"a" * 16), topic_of(b"b" * 16)


class Hub:
    """A hub that allows `OPEN` alone and says so on the topic, and peers that subscribe."""

    def __init__(self, context: Context, stack: ExitStack, address: str) -> None:
        self.allowed: list[bytes] = []
        self.open = {OPEN}
        self.hub = stack.enter_context(
            StreamHub(context, SECURITY, allow=lambda topic: topic in self.open, on_allowed=self._confirm)
        )
        self.hub.bind(address)
        self.hub.start()
        self._context, self._stack, self._address = context, stack, address

    def _confirm(self, topic: bytes) -> None:
        self.allowed.append(topic)
        self.hub.send([topic, b"allowed"])

    def subscriber(self, inbox: Inbox, *topics: bytes) -> Subscriber:
        subscriber = self._stack.enter_context(Subscriber(self._context, TOKENS, SECURITY, inbox))
        subscriber.connect(self._address)
        subscriber.start()
        for topic in topics:
            subscriber.subscribe(topic)
        return subscriber

    def raw(self, kind: int) -> zmq.Socket[bytes]:
        socket = self._context.raw(kind)
        socket.connect(self._address)
        self._stack.callback(socket.close, 0)
        return socket


async def test_an_open_stream_is_seen_by_who_asks_for_exactly_it(
    context: Context, stack: ExitStack, address: str
) -> None:
    hub, inbox = Hub(context, stack, address), Inbox()
    hub.subscriber(inbox, OPEN)
    assert await inbox.upto(1) == [[OPEN, b"allowed"]]

    hub.hub.send([OPEN, b"token"])

    assert (await inbox.upto(2))[1] == [OPEN, b"token"]
    assert hub.hub.refused == 0


async def test_everything_prefixes_and_unknown_topics_see_nothing(
    context: Context, stack: ExitStack, address: str
) -> None:
    hub, snoop, honest = Hub(context, stack, address), Inbox(), Inbox()
    bad = [b"", b"S", b"S|", OPEN[:-1], OPEN + b"x", OTHER]
    hub.subscriber(snoop, *bad)
    await until(lambda: hub.hub.refused == len(bad))
    hub.subscriber(honest, OPEN)
    await honest.upto(1)

    for _ in range(100):
        hub.hub.send([OPEN, b"secret"])
        hub.hub.send([OTHER, b"secret"])

    assert len(await honest.upto(101)) == 101
    assert snoop.messages == []
    assert hub.allowed == [OPEN]


async def test_the_flow_stops_when_a_subscriber_no_longer_wants_it(
    context: Context, stack: ExitStack, address: str
) -> None:
    """Seen by a peer that reads whatever comes: a `Subscriber` would filter it out itself."""
    hub = Hub(context, stack, address)
    raw = hub.raw(zmq.XSUB)
    raw.send(b"\x01" + OPEN)
    await until(lambda: raw.poll(0) > 0)
    assert raw.recv_multipart() == [OPEN, b"allowed"]
    stays = Inbox()
    hub.subscriber(stays, OPEN)
    await stays.upto(1)
    while raw.poll(50):
        raw.recv_multipart()

    raw.send(b"\x00" + OPEN)
    raw.send(b"\x01" + OTHER)  # read after it, so that its refusal shows when the first has been dealt with
    await until(lambda: hub.hub.refused == 1)
    hub.hub.send([OPEN, b"token"])

    await stays.upto(2)
    assert not raw.poll(50)


async def test_a_stream_that_was_closed_allows_nobody_new(context: Context, stack: ExitStack, address: str) -> None:
    hub, late = Hub(context, stack, address), Inbox()
    hub.open.clear()
    hub.subscriber(late, OPEN)
    await until(lambda: hub.hub.refused == 1)
    assert late.messages == []


async def test_a_message_that_is_no_request_cannot_shift_an_approval_to_somebody_else(
    context: Context, stack: ExitStack, address: str
) -> None:
    """libzmq then hands the victim's approval to the peer that asked next: see tests/zmq_semantics."""
    hub, victim = Hub(context, stack, address), Inbox()
    stray, thief = hub.raw(zmq.XSUB), hub.raw(zmq.XSUB)
    hub.subscriber(Inbox(), OTHER)
    await until(lambda: hub.hub.refused == 1)
    for peer in (stray, thief):  # all connected, and known to be
        peer.send(b"\x01" + OTHER)
    await until(lambda: hub.hub.refused == 3)
    subscriber = hub.subscriber(victim, topic_of(b"c" * 16))
    await until(lambda: hub.hub.refused == 4)

    stray.send(b"not a request")
    subscriber.subscribe(OPEN)
    thief.send(b"\x01" + OPEN[:-1])
    wait_while_the_loop_stands_still()
    await until(lambda: hub.hub.refused >= 5)
    hub.hub.send([OPEN, b"secret"])
    assert not thief.poll(100)

    subscriber.unsubscribe(OPEN)
    subscriber.subscribe(OPEN)  # who asked in good faith asks again
    await victim.upto(1)
    hub.hub.send([OPEN, b"token"])
    assert (await victim.upto(2))[-1] == [OPEN, b"token"]
    assert not thief.poll(50)


def wait_while_the_loop_stands_still() -> None:
    """Let all three messages arrive before the hub reads the first: a message is on its way for microseconds."""
    time.sleep(0.2)


async def test_tokens_reach_a_subscriber_as_topic_and_frame(context: Context, stack: ExitStack, address: str) -> None:
    inbox = Inbox()
    subscriber = stack.enter_context(Subscriber(context, TOKENS, SECURITY, inbox))
    subscriber.bind(address)
    subscriber.subscribe(b"")
    subscriber.start()
    publisher = stack.enter_context(Publisher(context, TOKENS, SECURITY, lambda batch: None))
    publisher.connect(address)
    publisher.start()

    def publish() -> bool:
        publisher.send([OPEN, b"frame"])
        return bool(inbox.messages)

    await until(publish)
    assert inbox.messages[0] == [OPEN, b"frame"]
