"""Between workers that cannot reach each other: found out by silence, and then through the broker that ordered it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from bus import messages as m
from bus import wire
from bus.errors import ConnectionLost
from bus.streams import token_bytes
from kvcache.hashing import HashSeed, block_digests
from tests.unit.workers.core_bench import CoreBench, commands
from workers.calls import Action, Channel, Send, ToCaller, ToPeer
from workers.copy_api import Lend, Lent, Wanted
from workers.keys import RunId
from workers.loans import LoanId
from workers.peer_puller import MAX_PULLS
from workers.relays import DETOUR_S, PATIENCE_S, PREFIX, Reach, relayed, through_broker

URL = "tcp://10.0.0.1:4000"
TICKET = b"t" * 16
SEED = HashSeed(model="model", dtype="float32", block_size=4)


@pytest.fixture
def reach() -> Reach:
    return Reach()


def is_direct(reach: Reach, now: float) -> bool:
    return reach.address(0, URL, "other", now) == URL


def test_who_answers_in_time_is_asked_directly(reach: Reach) -> None:
    reach.asked(URL, 0.0)
    reach.tick(PATIENCE_S)
    reach.heard(URL)
    reach.tick(9.0)
    assert is_direct(reach, 9.0)


def test_who_does_not_answer_is_asked_through_the_broker_for_a_while(reach: Reach) -> None:
    reach.asked(URL, 0.0)
    reach.asked(URL, 0.5)
    reach.tick(PATIENCE_S + 0.05)
    assert reach.address(3, URL, "other", 1.0) == relayed(3, "other")
    reach.tick(1.0 + DETOUR_S)
    assert is_direct(reach, 1.0 + DETOUR_S)


def test_to_whom_nothing_can_be_sent_is_out_of_reach_at_once_until_heard_of(reach: Reach) -> None:
    reach.lost(URL, 0.0)
    assert not is_direct(reach, 0.1)
    reach.heard(URL)
    assert is_direct(reach, 0.2)


def test_an_address_that_only_we_can_make_is_not_believed_of_anybody(reach: Reach) -> None:
    assert reach.address(0, relayed(99, "third"), "other", 0.0) == relayed(0, "other")
    assert relayed(0, "w").startswith(PREFIX)
    assert PREFIX[0] == "\0", "no peer can choose such a name"


def test_what_is_on_the_way_through_the_broker_says_nothing_of_the_direct_way(reach: Reach) -> None:
    reach.asked(relayed(0, "other"), 0.0)
    reach.tick(9.0)
    reach.lost(relayed(0, "other"), 9.0)
    assert is_direct(reach, 9.0)


def test_messages_go_directly_unless_their_address_says_otherwise() -> None:
    assert through_broker(ToPeer(URL, [b"x"])) is None
    assert through_broker(ToCaller(b"\0abcd", [b"x"])) is None
    sent = through_broker(ToPeer(relayed(1, "a/b"), [b"x", b"y"]))
    assert sent == Send(1, Channel.BULK, [wire.encode(m.Relay(worker_id="a/b", is_answer=False)), b"x", b"y"])
    sent = through_broker(ToCaller(relayed(0, "\xe4").encode(), [b"x"]))
    assert sent == Send(0, Channel.BULK, [wire.encode(m.Relay(worker_id="\xe4", is_answer=True)), b"x"])


def order(url: str) -> m.PullOrder:
    return m.PullOrder(worker_id="holder", url=url, ticket=TICKET, num_tokens=8, budget_ms=60_000)


def wanted(pull: m.PullOrder, now: float) -> Wanted:
    digests = block_digests(SEED, range(8))
    return Wanted(
        run=RunId(b"run"),
        order=pull,
        seed=SEED,
        tokens=token_bytes(range(8)),
        digests=digests,
        start=0,
        block_bytes=64,
        deadline=now + 60,
    )


def is_asked_directly(bench: CoreBench) -> bool:
    _, start = bench.start(pull=order(URL))
    return start.pull == order(URL)


def copy_order(url: str) -> m.CopySequence:
    return m.CopySequence(
        ticket=TICKET, worker_id="holder", url=url, tenant="t", seq_id="s", version=5, budget_ms=60_000
    )


def relays(actions: Sequence[Action]) -> list[tuple[m.Relay, list[bytes]]]:
    """What goes through the broker, and what is inside."""
    found = []
    for action in actions:
        if isinstance(action, ToPeer | ToCaller) and (sent := through_broker(action)) is not None:
            frames = [bytes(frame) for frame in sent.frames]
            found.append((wire.decode_header(frames[0]), frames[1:]))
    return found


def test_a_pull_that_found_nobody_there_goes_through_the_broker_the_next_time() -> None:
    """Its one end and the other, with the broker played by hand."""
    puller, holder = CoreBench(), CoreBench()
    puller.join()
    holder.join()
    _, start = puller.start(pull=order(URL))
    assert start.pull == order(URL)
    (ask,) = puller.engine(wanted(order(URL), puller.now))
    assert isinstance(ask, ToPeer)
    assert through_broker(ask) is None
    puller.pass_time(1.125)
    _, start = puller.start(pull=order(URL))
    assert start.pull is not None
    ((envelope, request),) = relays(puller.engine(wanted(start.pull, puller.now)))
    assert envelope == m.Relay(worker_id="holder", is_answer=False)

    holder.control(m.Grant(ticket=TICKET, target="w", tenant="t", num_tokens=8, ttl_ms=5000))
    by = wire.encode(m.Relay(worker_id="w", is_answer=False))
    (lend,) = commands(holder.core.on_bulk(0, [by, *request], holder.now), Lend)
    lent = Lent(LoanId(lend.loan), 2, block_digests(SEED, range(8))[-1], 64)
    ((envelope, answer),) = relays(holder.engine(lent))
    assert envelope == m.Relay(worker_id="w", is_answer=True)
    assert isinstance(wire.decode(list(answer)).message, m.BlocksFound)

    from_holder = wire.encode(m.Relay(worker_id="holder", is_answer=True))
    assert puller.core.on_bulk(0, [from_holder, *answer], puller.now) == []
    stray = wire.encode(m.Relay(worker_id="third", is_answer=True))
    lie = [wire.encode(wire.failed(wire.request_id_of(answer[0]), ConnectionLost("x")))]
    assert puller.core.on_bulk(0, [stray, *lie], puller.now) == [], "who was not asked is not listened to"
    stats = puller.core.stats(puller.now, rss_bytes=0, lag_s=0.0)
    assert sum(stats.peers.failures.values()) == 1, "that of the first time"


def test_who_was_not_asked_owes_no_answer() -> None:
    """A pull and a copy that are refused here, before anything is sent, say nothing of the way there."""
    bench = CoreBench()
    bench.join()
    for number in range(MAX_PULLS):
        elsewhere = wanted(order(f"tcp://10.0.0.9:{number}"), bench.now)
        assert bench.engine(replace(elsewhere, run=RunId(b"%d" % number)))
    too_many = bench.engine(wanted(order(URL), bench.now))
    bench.control(copy_order("tcp://10.0.0.9:9"))
    once_more = bench.control(copy_order(URL))
    assert not any(isinstance(action, ToPeer) for action in (*too_many, *once_more))
    bench.pass_time(1.125)
    assert is_asked_directly(bench)


def test_a_copy_that_found_nobody_there_goes_through_the_broker_the_next_time() -> None:
    bench = CoreBench()
    bench.join()
    bench.control(copy_order(URL))
    bench.pass_time(1.125)
    assert not is_asked_directly(bench)


def test_a_holder_that_has_no_time_before_the_pull_ends_is_within_reach() -> None:
    """Its engine is in a step that is longer than the pull's budget: all it ever says is its answer to `Cancel`."""
    puller, holder = CoreBench(), CoreBench()
    puller.join()
    holder.join()
    holder.control(m.Grant(ticket=TICKET, target="w", tenant="t", num_tokens=8, ttl_ms=5000))
    hurried = msgspec.structs.replace(order(URL), budget_ms=200)
    (ask,) = puller.engine(wanted(hurried, puller.now))
    assert isinstance(ask, ToPeer)
    assert commands(holder.core.on_peer_request(b"puller", ask.frames, holder.now), Lend)
    (cancel,) = [action for action in puller.pass_time(0.5) if isinstance(action, ToPeer)]
    (answer,) = [
        action
        for action in holder.core.on_peer_request(b"puller", cancel.frames, holder.now)
        if isinstance(action, ToCaller)
    ]
    assert puller.core.on_peer_answer(URL, answer.frames, puller.now) == []
    puller.pass_time(1.125)
    assert is_asked_directly(puller)
