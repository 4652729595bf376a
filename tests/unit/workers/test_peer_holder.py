"""A worker that others copy from: tickets first, credit always, and the loan goes back however it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import wire
from bus.errors import ErrorCode, NotFound
from bus.limits import CHUNK_BYTES
from bus.messages import BlocksFound, Cancel, Chunk, Credit, Failed, Grant, PullBlocks
from tests.unit.bus.any_message import any_frames
from tests.unit.workers.core_bench import commands
from workers.callers import GRACE_S, IDLE_S, MAX_PARKED
from workers.calls import Action, ToCaller
from workers.copy_api import BlocksRead, CopyBroke, Lend, Lent, ReadBlocks, Return
from workers.peer_holder import MAX_COPIES, Holder
from workers.tickets import MAX_TICKETS

TOKENS = bytes(4 * 4 * 10)  # ten blocks of four
BLOCK_BYTES = 400_000
TICKET = b"t" * 16
PEER = b"peer"


def grant(ticket: bytes = TICKET, **changes: Any) -> Grant:
    fields: dict[str, Any] = {"ticket": ticket, "target": "puller", "tenant": "mine", "num_tokens": 40, "ttl_ms": 1000}
    return Grant(**(fields | changes))


def ask(ticket: bytes = TICKET, number: int = 1, tokens: bytes = TOKENS, **changes: Any) -> list[Any]:
    fields: dict[str, Any] = {
        "req_id": number.to_bytes(16, "big"),
        "ticket": ticket,
        "worker_id": "puller",
        "fingerprint": "f",
        "dtype": "float32",
        "layout_version": 1,
        "block_size": 4,
        "cache_salt": "salt",
        "start": 0,
        "digest": bytes(32),
        "credit": 3,
        "payload": wire.describe([tokens]),
    }
    return [wire.encode(PullBlocks(**(fields | changes))), tokens]


def said(actions: Sequence[Action]) -> list[Any]:
    return [wire.decode(action.frames).message for action in actions if isinstance(action, ToCaller)]


def codes(actions: Sequence[Action]) -> list[int]:
    return [message.code for message in said(actions) if isinstance(message, Failed)]


@pytest.fixture
def holder() -> Holder:
    return Holder()


def lend(holder: Holder, num_blocks: int = 10, **changes: Any) -> tuple[Lend, list[Action]]:
    """A copy that was admitted and whose blocks were found; what follows from that."""
    holder.granted(grant(), now=0.0)
    (wanted,) = commands(holder.on_message(PEER, ask(**changes), now=0.0), Lend)
    return wanted, holder.on_engine(Lent(wanted.loan, num_blocks, b"d" * 32, BLOCK_BYTES), now=0.0)  # type: ignore[arg-type]


def serve(holder: Holder, actions: list[Action]) -> tuple[list[Chunk], list[Action]]:
    """Play the engine until it has nothing to read; the chunks that were sent, and all actions."""
    done = list(actions)
    queue = commands(actions, ReadBlocks)
    while queue:
        read = queue.pop(0)
        data = b"".join(bytes([block]) * BLOCK_BYTES for block in range(read.first, read.stop))
        more = holder.on_engine(BlocksRead(read.loan, memoryview(data)), now=0.0)
        done += more
        queue += commands(more, ReadBlocks)
    return [message for message in said(done) if isinstance(message, Chunk)], done


def test_tenant_is_that_of_the_ticket_whatever_is_asked(holder: Holder) -> None:
    holder.granted(grant(tenant="theirs"), now=0.0)
    (wanted,) = commands(holder.on_message(PEER, ask(), now=0.0), Lend)
    assert (wanted.tenant, wanted.cache_salt, wanted.tokens) == ("theirs", "salt", TOKENS)


def test_blocks_go_out_in_order_and_as_far_as_credit_goes(holder: Holder) -> None:
    wanted, actions = lend(holder, start=2)
    assert said(actions)[0] == BlocksFound(
        req_id=(1).to_bytes(16, "big"), num_blocks=10, digest=b"d" * 32, block_bytes=BLOCK_BYTES
    )
    chunks, actions = serve(holder, actions)
    assert len(chunks) == 3
    assert not commands(actions, Return)
    more, actions = serve(
        holder, holder.on_message(PEER, [wire.encode(Credit(req_id=(1).to_bytes(16, "big"), chunks=9))], 0.0)
    )
    sent = [*chunks, *more]
    assert [chunk.offset for chunk in sent] == [sum(c.payload[0].nbytes for c in sent[:i]) for i in range(len(sent))]
    assert sum(chunk.payload[0].nbytes for chunk in sent) == 8 * BLOCK_BYTES
    assert all(chunk.payload[0].nbytes <= CHUNK_BYTES for chunk in sent)
    assert commands(actions, Return) == [Return(wanted.loan)]
    assert (len(holder), holder.num_served, holder.served_bytes) == (0, 1, 8 * BLOCK_BYTES)


def test_no_more_is_read_than_there_is_credit_for(holder: Holder) -> None:
    _, actions = lend(holder, credit=1)
    assert len(commands(actions, ReadBlocks)) == 1
    _, actions = lend_second(holder, credit=0)
    assert not commands(actions, ReadBlocks)


def lend_second(holder: Holder, **changes: Any) -> tuple[Lend, list[Action]]:
    holder.granted(grant(b"u" * 16), now=0.0)
    (wanted,) = commands(holder.on_message(PEER, ask(b"u" * 16, number=2, **changes), now=0.0), Lend)
    return wanted, holder.on_engine(Lent(wanted.loan, 10, b"d" * 32, BLOCK_BYTES), now=0.0)  # type: ignore[arg-type]


def test_stranger_is_refused_after_the_broker_had_time_to_speak(holder: Holder) -> None:
    assert holder.on_message(PEER, ask(), now=0.0) == []
    assert holder.tick(GRACE_S / 2) == []
    assert codes(holder.tick(GRACE_S)) == [ErrorCode.FORBIDDEN]
    assert holder.granted(grant(), GRACE_S) == [], "nobody waits any more"


def test_ticket_that_is_announced_a_little_later_is_good(holder: Holder) -> None:
    holder.on_message(PEER, ask(), now=0.0)
    assert len(commands(holder.granted(grant(), now=GRACE_S / 2), Lend)) == 1
    assert holder.tick(GRACE_S) == []


def test_ticket_is_good_once(holder: Holder) -> None:
    lend(holder)
    assert holder.on_message(b"other", ask(number=2), now=0.0) == []
    assert codes(holder.tick(GRACE_S)) == [ErrorCode.FORBIDDEN]


@pytest.mark.parametrize(
    "refused",
    [
        ask(worker_id="another"),
        ask(tokens=bytes(4 * 4 * 11)),
    ],
    ids=["another worker's", "more tokens"],
)
def test_ticket_is_good_for_what_it_was_made_for_only(holder: Holder, refused: list[Any]) -> None:
    holder.granted(grant(), now=0.0)
    actions = holder.on_message(PEER, refused, now=0.0)
    assert codes(actions) == [ErrorCode.FORBIDDEN]
    assert not commands(actions, Lend)


def test_ticket_expires(holder: Holder) -> None:
    holder.granted(grant(ttl_ms=500), now=0.0)
    assert codes(holder.on_message(PEER, ask(), now=0.5)) == [ErrorCode.FORBIDDEN]
    holder.granted(grant(ttl_ms=500), now=1.0)
    holder.tick(1.5)
    assert holder.on_message(PEER, ask(number=2), now=1.5) == [], "unknown by now"


def test_tokens_that_are_no_whole_blocks_are_refused(holder: Holder) -> None:
    for tokens in (b"", bytes(15), bytes(24)):
        holder.granted(grant(), now=0.0)
        assert codes(holder.on_message(PEER, ask(tokens=tokens), now=0.0)) == [ErrorCode.BAD_FRAME]


def test_engine_that_has_no_such_blocks_says_why(holder: Holder) -> None:
    holder.granted(grant(), now=0.0)
    (wanted,) = commands(holder.on_message(PEER, ask(), now=0.0), Lend)
    actions = holder.on_engine(CopyBroke(wanted.loan, NotFound("none")), now=0.0)
    assert codes(actions) == [ErrorCode.NOT_FOUND]
    assert len(holder) == 0


def test_cancel_returns_the_loan(holder: Holder) -> None:
    wanted, _ = lend(holder)
    cancel = [wire.encode(Cancel(req_id=(1).to_bytes(16, "big")))]
    strangers = holder.on_message(b"stranger", cancel, now=0.0)
    assert commands(strangers, Return) == [], "it is not the stranger's to cancel"
    actions = holder.on_message(PEER, cancel, now=0.0)
    assert commands(actions, Return) == [Return(wanted.loan)]
    assert codes(strangers) == codes(actions) == [ErrorCode.CANCELLED], "whoever cancels hears that we are there"
    assert holder.on_engine(BlocksRead(wanted.loan, memoryview(b"x")), now=0.0) == []


def test_loan_that_comes_after_its_taker_left_goes_straight_back(holder: Holder) -> None:
    holder.granted(grant(), now=0.0)
    (wanted,) = commands(holder.on_message(PEER, ask(), now=0.0), Lend)
    holder.lose(PEER)
    late = holder.on_engine(Lent(wanted.loan, 10, b"d" * 32, BLOCK_BYTES), now=0.0)  # type: ignore[arg-type]
    assert commands(late, Return) == [Return(wanted.loan)]


def test_taker_that_falls_silent_holds_nothing(holder: Holder) -> None:
    wanted, _ = lend(holder)
    assert holder.tick(IDLE_S) == []
    assert commands(holder.tick(IDLE_S + 0.1), Return) == [Return(wanted.loan)]


def test_link_that_is_gone_holds_nothing(holder: Holder) -> None:
    wanted, _ = lend(holder)
    assert holder.lose(b"another") == []
    assert commands(holder.lose(PEER), Return) == [Return(wanted.loan)]


def test_copies_at_a_time_are_limited_and_strangers_take_no_place(holder: Holder) -> None:
    for number in range(MAX_PARKED):
        assert holder.on_message(b"stranger", ask(b"x" * 16, number=number), now=0.0) == []
    assert codes(holder.on_message(b"stranger", ask(b"x" * 16, number=99), now=0.0)) == [ErrorCode.FORBIDDEN]
    for number in range(MAX_COPIES):
        ticket = number.to_bytes(16, "big")
        holder.granted(grant(ticket), now=0.0)
        assert len(commands(holder.on_message(PEER, ask(ticket, number=number), now=0.0), Lend)) == 1
    holder.granted(grant(), now=0.0)
    assert codes(holder.on_message(PEER, ask(number=77), now=0.0)) == [ErrorCode.OVERLOADED]


def test_tickets_are_bounded(holder: Holder) -> None:
    for number in range(MAX_TICKETS + 1):
        holder.granted(grant(number.to_bytes(16, "big")), now=0.0)
    assert holder.on_message(PEER, ask((0).to_bytes(16, "big")), now=0.0) == [], "the oldest was forgotten"
    assert commands(holder.on_message(PEER, ask((1).to_bytes(16, "big"), number=2), now=0.0), Lend)


@given(st.lists(any_frames()))
def test_no_bytes_at_all_upset_it(batch: list[list[bytes]]) -> None:
    holder = Holder()
    for frames in batch:
        assert not commands(holder.on_message(PEER, frames, now=0.0), Lend)
